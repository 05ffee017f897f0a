"""What targets hold in one pass, and the edits that change it.

Of a dictionary's site `y = features + error + bias`; each summand is taken from the unedited
stream of the pass under way, and `y` becomes `y + (new - old)` of what was asked for: everything
else stays, the error included. Sums are float64, so that parts that make up `y` add up to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.lm import Edit, Run, Tokens
from gemscope.sae import SAE, Dictionary, SparseFeatures
from gemscope.sites import Site, each

from ._parts import Feature
from ._target import FeatureTarget, Part, PartTarget, SiteTarget, Target, order


class View:
    """Values at sites for some tokens, and what dictionaries make of them, each computed once."""

    def __init__(self, values: Mapping[Site, Tensor] | None = None):
        self.values = dict(values or {})
        self._codes: dict[tuple[int, int], SparseFeatures] = {}
        self._features: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, Site], dict[Part, Tensor]] = {}

    @classmethod
    def of(cls, run: Run) -> "View":
        """The first row of a run, without gradients."""
        return cls({site: value[0].detach() for site, value in run.values.items()})

    def code(self, sae: Dictionary, place: int) -> SparseFeatures:
        """The features of one layer of `sae`, numbered from 0 in it."""
        key = id(sae), place
        if key not in self._codes:
            x = self.values[each(sae.reads)[place]]
            if isinstance(sae, SAE):
                self._codes[key] = sae.encode(x.float())
            else:
                self._codes[key] = sae.encode_layer(x.float(), place)
        return self._codes[key]

    def feature(self, feature: Feature) -> Float[Tensor, " n"]:
        """Its activations, float64."""
        if id(feature) not in self._features:
            x = self.values[feature.reads]
            self._features[id(feature)] = feature.values(x.float()).double()
        return self._features[id(feature)]

    def part(self, sae: Dictionary, part: Part, site: Site) -> Float[Tensor, "n d_out"]:
        """One of the three summands of what is at `site`, float64."""
        key = id(sae), site
        if key not in self._parts:
            self._parts[key] = self._split(sae, site)
        return self._parts[key][part]

    def _split(self, sae: Dictionary, site: Site) -> dict[Part, Tensor]:
        place = each(sae.writes).index(site)
        x, y = self.values[each(sae.reads)[place]].float(), self.values[site].double()
        if isinstance(sae, SAE):
            made, own_bias, skip = sae.decode(self.code(sae, 0), x), sae.b_dec, sae.skip
        else:
            codes = [self.code(sae, p) for p in range(place + 1)]
            layer = sae.layers[place]
            made, own_bias, skip = sae.decode_layer(codes, place, x), layer.b_dec, layer.skip
        bias = own_bias.double().expand_as(y)
        if skip is not None:
            bias = bias + x.double() @ skip.double()
        return {Part.ALL: made.double() - bias, Part.ERROR: y - made.double(), Part.BIAS: bias}

    def held(self, target: Target, site: Site) -> Float[Tensor, "n ..."]:
        """What `target` holds at `site`: activations `[n]` of a feature, otherwise `[n, d]`."""
        match target:
            case FeatureTarget():
                return self.feature(target.feature)
            case PartTarget():
                return self.part(target.sae, target.part, site)
            case SiteTarget():
                return self.values[site][:, target.span]


New = Callable[[Target, Site, Int[Tensor, " n"]], Tensor | float]
"""What a target is to hold at a site, for tokens at some positions."""


@dataclass(frozen=True, eq=False)
class Constant:
    """The same everywhere: 0 is ablation."""

    value: float = 0.0

    def __call__(self, _target: Target, _site: Site, _positions: Tensor) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True, eq=False)
class Patched:
    """What the target holds in another run, at the positions that stand opposite."""

    view: View
    opposite: Int[Tensor, " seq"]

    def __call__(self, target: Target, site: Site, positions: Tensor) -> Tensor:
        """The values of the other run."""
        held = self.view.held(target, site)
        return held[self.opposite.to(held.device)[positions.to(held.device)]]


@dataclass(frozen=True, eq=False)
class Means:
    """The mean of what each target holds over a text."""

    values: Mapping[tuple[int, Site], Tensor]

    def __call__(self, target: Target, site: Site, _positions: Tensor) -> Tensor:
        """The mean, the same at every token."""
        return self.values[id(target), site]


@dataclass(frozen=True, eq=False)
class Intervening:
    """The edits of one pass that put new values into targets; each row has its own positions."""

    targets: tuple[Target, ...]
    new: New
    where: Bool[Tensor, "rows seq"]

    def steps(self) -> tuple[Edit, ...]:
        """One edit for each site written, in the order of the pass."""
        view = View()
        sites = {site for target in self.targets for site in target.writes}
        return tuple(self._step(site, view) for site in sorted(sites, key=order))

    def _step(self, site: Site, view: View) -> Edit:
        mine = [target for target in self.targets if site in target.writes]
        sources = tuple(dict.fromkeys((site, *(s for t in mine for s in t.reads(site)))))

        def function(tokens: Tokens, *xs: Tensor) -> Tensor:
            chosen = self.where.to(xs[0].device)[tokens.rows, tokens.positions]
            # A row by itself is encoded in the shape that other runs are: what is the same in
            # both is then the same to the last bit.
            kept = torch.ones_like(chosen) if len(self.where) == 1 else chosen
            for source, x in zip(sources, xs, strict=True):
                view.values[source] = x[kept]
            old = xs[0][kept]
            new = self._changed(mine, site, view, old, tokens.positions[kept])
            out = xs[0].clone()
            out[kept] = torch.where(chosen[kept][:, None], new, old)
            return out

        return Edit(sources, site, function, placed=True)

    def _changed(
        self, mine: list[Target], site: Site, view: View, old: Tensor, positions: Tensor
    ) -> Tensor:
        if isinstance(mine[0], SiteTarget):
            out = old.clone()
            for target in mine:
                assert isinstance(target, SiteTarget)
                out[:, target.span] = torch.as_tensor(self.new(target, site, positions)).to(out)
            return out
        moved = torch.zeros_like(old, dtype=torch.float64)
        for target in mine:
            change = self.new(target, site, positions) - view.held(target, site)
            if isinstance(target, FeatureTarget):
                row = target.feature.rows[site].to(change.device)
                change = change[:, None] * row.double()
            moved += change
        return (old.double() + moved).to(old.dtype)


@dataclass(frozen=True, eq=False)
class Added:
    """The edits of one pass that add to sites, for each row and position."""

    what: Mapping[Site, Float[Tensor, "rows seq d"]]

    def steps(self) -> tuple[Edit, ...]:
        """One edit for each site, in the order of the pass."""
        return tuple(self._step(site) for site in sorted(self.what, key=order))

    def _step(self, site: Site) -> Edit:
        def function(tokens: Tokens, x: Tensor) -> Tensor:
            more = self.what[site].to(x.device)[tokens.rows, tokens.positions]
            return (x.double() + more).to(x.dtype) if more.dtype == torch.float64 else x + more

        return Edit(site, site, function, placed=True)
