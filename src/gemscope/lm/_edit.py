"""What to do to sites of the forward pass, as values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.sae import SAE, CrossLayer, Dictionary, SparseFeatures
from gemscope.sites import Site


@dataclass(frozen=True, slots=True)
class Edit:
    """Replaces what `writes` holds at the tokens that count by a function of what `reads` holds.

    `function` takes the tokens that count, `[n_tokens, d_in]` for each site read, and gives
    `[n_tokens, d_out]`. Every site read must be computed no later than `writes`, which may be one
    of them. Tokens that do not count (BOS first of all, an outlier that no dictionary was trained
    on) stay as they are. A `placed` edit is given every token but padding, and before the others
    the `Tokens` that say where each stands: it decides itself which stay as they are.
    """

    reads: Site | tuple[Site, ...]
    writes: Site
    function: Callable[..., Float[Tensor, "n_tokens d_out"]]
    placed: bool = False

    def steps(self) -> tuple["Edit", ...]:
        """The edits of one pass."""
        return (self,)


@runtime_checkable
class Edits(Protocol):
    """One or several edits of a pass, which may share what they compute in it."""

    def steps(self) -> tuple[Edit, ...]:
        """The edits of one pass, made anew for each, in the order of the sites they write."""
        ...


@dataclass(frozen=True, slots=True)
class LayerSplice:
    """Puts reconstructions of a multi-layer model in the place of what it reconstructs.

    Features are encoded from the activations of the pass under way: those of later layers have
    seen the edits of earlier ones, as in a model whose parts have been replaced.
    """

    sae: CrossLayer
    places: tuple[int, ...]
    """Which of the sites written, by place."""

    def steps(self) -> tuple[Edit, ...]:
        """One edit for each place; features are encoded once and shared."""
        parts: list[SparseFeatures] = []
        return tuple(
            self._step(place, before, parts)
            for place, before in zip(self.places, (-1, *self.places), strict=False)
        )

    def _step(self, place: int, before: int, parts: list[SparseFeatures]) -> Edit:
        sites = self.sae.reads[before + 1 : place + 1]

        def function(*xs: Tensor) -> Tensor:
            for x in xs:
                parts.append(self.sae.encode_layer(x, len(parts)))
            return self.sae.decode_layer(parts, place, xs[-1])

        return Edit(tuple(sites), self.sae.writes[place], function)


def splice(sae: Dictionary, at: Sequence[Site] | None = None) -> Edits:
    """Puts the reconstruction of `sae` in the place of what it reconstructs.

    Of a multi-layer model all sites it writes are replaced, or those in `at`.
    """
    if isinstance(sae, SAE):
        if at is not None and tuple(at) != (sae.writes,):
            raise InputError(f"this dictionary writes {sae.writes} and nothing else")
        return Edit(sae.reads, sae.writes, sae.reconstruct)
    wanted = sae.writes if at is None else tuple(at)
    if not wanted or (absent := [s for s in wanted if s not in sae.writes]):
        raise InputError(
            f"this model writes {sae.writes}; name sites among them, not "
            f"{', '.join(map(str, absent)) if wanted else 'none'}"
        )
    return LayerSplice(sae, tuple(sorted(sae.writes.index(s) for s in wanted)))


def replace(site: Site, value: Float[Tensor, " d"]) -> Edit:
    """Puts one vector in the place of every token's: zero and mean ablation."""
    return Edit(site, site, lambda x: value.to(x.device).expand(len(x), -1))
