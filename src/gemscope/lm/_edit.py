"""What to do to one site of the forward pass, as a value."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gemscope.sae import SAE
from gemscope.sites import Site


@dataclass(frozen=True, slots=True)
class Edit:
    """Replaces what `writes` holds at the tokens that count by a function of what `reads` holds.

    `function` takes the tokens that count as `[n_tokens, d_in]` and gives `[n_tokens, d_out]`.
    `reads` must be computed no later than `writes`; the two may be the same site. Tokens that do
    not count (BOS first of all, an outlier that no dictionary was trained on) stay as they are.
    """

    reads: Site
    writes: Site
    function: Callable[[Float[Tensor, "n_tokens d_in"]], Float[Tensor, "n_tokens d_out"]]


def splice(sae: SAE) -> Edit:
    """Puts the reconstruction of `sae` in the place of what it reconstructs."""
    return Edit(sae.reads, sae.writes, sae.reconstruct)


def replace(site: Site, value: Float[Tensor, " d"]) -> Edit:
    """Puts one vector in the place of every token's: zero and mean ablation."""
    return Edit(site, site, lambda x: value.to(x.device).expand(len(x), -1))
