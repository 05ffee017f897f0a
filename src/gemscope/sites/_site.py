"""Places where activations are read or written."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from gemscope.errors import InputError, did_you_mean


class Stream(StrEnum):
    """What is read in a layer of a transformer; shapes are per token."""

    RESID_PRE = "resid_pre"
    """Residual stream before the block `[d_model]`."""
    RESID_MID = "resid_mid"
    """Residual stream between attention and MLP `[d_model]`."""
    RESID_POST = "resid_post"
    """Residual stream after the block `[d_model]`."""
    ATTN_HEADS = "attn_heads"
    """Input of the attention's output projection, heads concatenated `[heads * d_head]`. Gemma
    Scope calls it attention output."""
    ATTN_OUT = "attn_out"
    """What attention adds to the residual stream, after its post-norm `[d_model]`."""
    MLP_IN = "mlp_in"
    """Normed input of the MLP, gain included `[d_model]`."""
    MLP_IN_UNSCALED = "mlp_in_unscaled"
    """Normed input of the MLP, gain removed `[d_model]`: Gemma Scope 1 transcoders read it."""
    MLP_HIDDEN = "mlp_hidden"
    """Input of the MLP's last projection `[d_mlp]`."""
    MLP_OUT = "mlp_out"
    """What the MLP adds to the residual stream, after its post-norm `[d_model]`."""
    EMBED = "embed"
    """Scaled token embedding `[d_model]`; its layer is 0."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A stream of one layer, written `12.resid_post`; layers count from 0."""

    layer: int
    stream: Stream

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `str` writes as `text`."""
        match = re.fullmatch(r"(\d{1,4})\.(\w+)", text)
        if match is None:
            raise InputError(
                f"no such site: {text!r}; write LAYER.STREAM, such as 3.resid_post, "
                f"with STREAM one of {', '.join(Stream)}"
            )
        if match[2] not in list(Stream):
            raise InputError(f"no stream named {match[2]!r}; {did_you_mean(match[2], Stream)}")
        return cls(int(match[1]), Stream(match[2]))

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"


class Sites(tuple[Site, ...]):
    """One stream of several layers, written `7,13,17,22.resid_post` or `0-25.mlp_in`.

    What a multi-layer model reads or writes: activations there are stacked on the axis before the
    last, `[..., n_sites, d]`, in this order.
    """

    __slots__ = ()

    def __new__(cls, sites: Iterable[Site]) -> "Sites":
        """`sites` in ascending order of layers, all of one stream."""
        made = super().__new__(cls, sites)
        if not made or len({s.stream for s in made}) != 1 or list(made) != sorted(set(made)):
            raise InputError(
                f"{', '.join(map(str, made)) or 'nothing'} are not sites of one stream in "
                "ascending layers"
            )
        return made

    @classmethod
    def parse(cls, text: str) -> "Sites":
        """The sites that `str` writes as `text`."""
        match = re.fullmatch(r"([\d,-]{1,400})\.(\w+)", text)
        layers: list[int] = []
        for part in match[1].split(",") if match else [""]:
            span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            if match is None or span is None:
                raise InputError(
                    f"no such sites: {text!r}; write LAYERS.STREAM, such as 7,13.resid_post or "
                    "0-25.mlp_in"
                )
            layers += range(int(span[1]), int(span[2] or span[1]) + 1)
        assert match is not None
        return cls(Site.parse(f"{layer}.{match[2]}") for layer in layers)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for site in self:
            if runs and runs[-1][-1] == site.layer - 1:
                runs[-1].append(site.layer)
            else:
                runs.append([site.layer])
        # Two layers side by side are no span worth a dash.
        spans = [f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
        return f"{','.join(spans)}.{self[0].stream}"

    def __repr__(self) -> str:
        return f"Sites({str(self)!r})"


def each(sites: Site | Sites) -> tuple[Site, ...]:
    """`sites` as a tuple, be it one or several."""
    return (sites,) if isinstance(sites, Site) else tuple(sites)


def parse_sites(text: str) -> Site | Sites:
    """One site or several, as `str` writes either."""
    return Site.parse(text) if re.fullmatch(r"\d+\.\w+", text) else Sites.parse(text)
