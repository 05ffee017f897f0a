"""What an intervention changes: a feature, a part of a dictionary, a site, a head.

What is written at a site is `y = features + error + bias`: the decoder rows times the feature
activations, what the reconstruction leaves, and `b_dec` with the skip connection of an affine
transcoder. A target is one of these, or one feature, or the whole of `y`, or one head's slice of
it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary
from gemscope.sites import Site, Stream, each

from ._parts import Feature, feature

Load = Callable[[str], Dictionary]
"""From an address to its dictionary."""


class Part(StrEnum):
    """One of the three summands of what is written at a dictionary's site."""

    ALL = "all"
    """All features together."""
    ERROR = "error"
    """What the reconstruction leaves."""
    BIAS = "bias"
    """`b_dec`, and the skip connection of an affine transcoder."""


@dataclass(frozen=True, eq=False, slots=True)
class FeatureTarget:
    """One feature of a dictionary: its part is its activation times its decoder row."""

    feature: Feature

    @property
    def name(self) -> str:
        """`ADDRESS/INDEX`."""
        return self.feature.name

    @property
    def writes(self) -> tuple[Site, ...]:
        """Where it is written."""
        return tuple(self.feature.rows)

    def reads(self, _site: Site) -> tuple[Site, ...]:
        """What has to be known for its change at a site."""
        return (self.feature.reads,)


@dataclass(frozen=True, eq=False, slots=True)
class PartTarget:
    """All features of a dictionary, its error or its bias, at `writes`."""

    name: str
    sae: Dictionary
    part: Part
    writes: tuple[Site, ...]

    def reads(self, site: Site) -> tuple[Site, ...]:
        """What has to be known for its change at `site`: what is written comes from layers up to
        its own.
        """
        last = each(self.sae.writes).index(site)
        return each(self.sae.reads)[: last + 1]


@dataclass(frozen=True, slots=True)
class SiteTarget:
    """A whole site, or the numbers `first` to `stop` of it that one attention head writes."""

    name: str
    site: Site
    first: int = 0
    stop: int | None = None

    @property
    def span(self) -> slice:
        """Its numbers at each token."""
        return slice(self.first, self.stop)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the site."""
        return self.stop is None

    @property
    def writes(self) -> tuple[Site, ...]:
        """The site itself."""
        return (self.site,)

    def reads(self, site: Site) -> tuple[Site, ...]:
        """Nothing but the site."""
        return (site,)


Target = FeatureTarget | PartTarget | SiteTarget
"""Something to patch, ablate or set."""


def dictionary_name(sae: Dictionary) -> str:
    """A dictionary's address, or what it is."""
    return sae.origin.address or f"{sae.kind} at {sae.writes}"


def target(text: str, model: LanguageModel, load: Load) -> Target:
    """The target that `text` names, checked against `model`.

    `3.mlp_out`, `3.attn_heads/2`, or of a dictionary `ADDRESS/INDEX`, `ADDRESS/all`,
    `ADDRESS/error`, `ADDRESS/bias`; of one that writes several sites, the last three also at one
    of them, as in `ADDRESS/error@3.mlp_out`.

    Raises:
        InputError: No such site, head, dictionary, feature or part, or another model's.
    """
    if (address := address_of(text)) is None:
        return _site_target(text, model)
    last, _, at = text.rpartition("/")[2].partition("@")
    if not address or not (last in list(Part) or (last.isdecimal() and len(last) < 10 and not at)):
        raise InputError(
            f"{text!r} names nothing to change: write ADDRESS/INDEX for a feature, ADDRESS/all, "
            "ADDRESS/error or ADDRESS/bias for what a dictionary makes of a site, a site such as "
            "3.mlp_out, or a head such as 3.attn_heads/2"
        )
    sae = load(address)
    model.check(sae)
    if last.isdecimal():
        return feature_target(sae, int(last), name=f"{address}/{int(last)}")
    sites = each(sae.writes)
    if at and Site.parse(at) not in sites:
        raise InputError(f"{address} writes {sae.writes}: it has no {last} at {at}")
    return PartTarget(text, sae, Part(last), (Site.parse(at),) if at else sites)


def address_of(text: str) -> str | None:
    """The dictionary's address in the text of a target, None for a site or head."""
    return None if re.fullmatch(r"\d+\.\w+(/\w*)?", text) else text.rpartition("/")[0]


def feature_target(sae: Dictionary, index: int, *, name: str | None = None) -> FeatureTarget:
    """One feature of `sae` as a target; refuses a number the dictionary does not have."""
    if not 0 <= index < sae.d_sae:
        raise InputError(
            f"{dictionary_name(sae)} has no feature {index}: it has 0 to {sae.d_sae - 1}"
        )
    return FeatureTarget(feature(sae, index, name=name or f"{dictionary_name(sae)}/{index}"))


def _site_target(text: str, model: LanguageModel) -> SiteTarget:
    where, _, head = text.partition("/")
    site = Site.parse(where)
    width = model.width(site)
    if "/" not in text:
        return SiteTarget(text, site)
    if site.stream is not Stream.ATTN_HEADS:
        raise InputError(
            f"{text!r} names a head, and {site.stream} is not parted into heads: write "
            f"{site.layer}.attn_heads/{head or 0}, or {site} for the whole site"
        )
    heads = model.config.num_attention_heads
    if not head.isdecimal() or int(head) >= heads:
        raise InputError(f"{text!r}: layer {site.layer} has the heads 0 to {heads - 1}")
    size = width // heads
    return SiteTarget(text, site, int(head) * size, (int(head) + 1) * size)


def check_together(targets: Sequence[Target]) -> None:
    """Refuse targets that change the same numbers, or none at all."""
    if not targets:
        raise InputError("nothing to change was named; give at least one target")
    seen: dict[tuple[str, Site], Target] = {}
    for one in targets:
        for site in one.writes:
            if (what := _kind(one, site)) in seen:
                raise InputError(f"{one.name} and {seen[what].name} are the same: name it once")
            seen[what] = one
    for site in dict.fromkeys(s for one in targets for s in one.writes):
        _check_site(site, [one for one in targets if site in one.writes])


def _check_site(site: Site, here: list[Target]) -> None:
    whole = next((t for t in here if isinstance(t, SiteTarget) and t.is_whole), None)
    sites = [t for t in here if isinstance(t, SiteTarget)]
    if len(here) > 1 and (whole or 0 < len(sites) < len(here)):
        one = whole or sites[0]
        other = next(t for t in here if t is not one and (whole or not isinstance(t, SiteTarget)))
        raise InputError(
            f"{one.name} and {other.name} change the same numbers at {site}: do one of them"
        )
    parts = [t for t in here if isinstance(t, PartTarget)]
    for part in parts:
        for other in here:
            of = other.feature.sae if isinstance(other, FeatureTarget) else None
            of = other.sae if isinstance(other, PartTarget) else of
            if of is not None and of is not part.sae:
                raise InputError(
                    f"{part.name} and {other.name} are two accounts of what is at {site}: take "
                    "parts of one dictionary"
                )
            if isinstance(other, FeatureTarget) and part.part is Part.ALL:
                raise InputError(f"{other.name} is among {part.name}: do one of them")


def _kind(one: Target, site: Site) -> tuple[str, Site]:
    if isinstance(one, FeatureTarget):
        return f"{id(one.feature.sae)}/{one.feature.index}", site
    if isinstance(one, PartTarget):
        return f"{id(one.sae)}/{one.part}", site
    return one.name, site


_ORDER = (
    Stream.EMBED, Stream.RESID_PRE, Stream.ATTN_HEADS, Stream.ATTN_OUT, Stream.RESID_MID,
    Stream.MLP_IN_UNSCALED, Stream.MLP_IN, Stream.MLP_HIDDEN, Stream.MLP_OUT, Stream.RESID_POST,
)  # fmt: skip


def order(site: Site) -> tuple[int, int]:
    """A key that sorts sites as a pass computes them."""
    return site.layer, _ORDER.index(site.stream)


def sites_of(targets: Sequence[Target]) -> tuple[Site, ...]:
    """Sites that targets write."""
    return tuple(dict.fromkeys(site for one in targets for site in one.writes))


def reads_of(targets: Sequence[Target]) -> tuple[Site, ...]:
    """Sites that have to be known to change targets, those written among them."""
    pairs = [(one, site) for one in targets for site in one.writes]
    return tuple(dict.fromkeys(s for one, site in pairs for s in (site, *one.reads(site))))
