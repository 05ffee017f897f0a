"""Encode a batch so that near misses are seen as well as what fires."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import SAE, CrossLayer, Dictionary, JumpReLU, ReLU, SparseFeatures, TopK


class WithNearMisses:
    """A dictionary, and the same with its threshold lowered to the share `lowered` of it.

    One encoding with the lowered thresholds gives both: what is above the true threshold fires.
    A `TopK` has no threshold: there, features among the first `2 k` that are not among the first
    `k` came near. A `ReLU` has none that could be lowered, and no near misses.
    """

    def __init__(self, sae: Dictionary, lowered: float):
        self.sae = sae
        self.threshold: Tensor | None = None
        self.lower: Dictionary | None = None
        if isinstance(sae, CrossLayer):
            self.threshold = torch.cat([layer.threshold for layer in sae.layers]).clamp_min(0)
            self.lower = replace(
                sae,
                layers=tuple(
                    replace(x, threshold=x.threshold.clamp_min(0) * lowered) for x in sae.layers
                ),
            )
        elif isinstance(sae.activation, JumpReLU):
            self.threshold = sae.activation.threshold.clamp_min(0)
            self.lower = replace(sae, activation=JumpReLU(self.threshold * lowered))
        elif isinstance(sae.activation, TopK):
            self.lower = replace(sae, activation=TopK(2 * sae.activation.k))

    def encode(
        self, x: Float[Tensor, "n_tokens ..."]
    ) -> tuple[SparseFeatures, SparseFeatures | None]:
        """What fires on the tokens `x [n_tokens, ...]`, and all that fires or comes near."""
        if self.lower is None:
            return self.sae.encode(x), None
        wide = self.lower.encode(x)
        if self.threshold is None:
            return self.sae.encode(x), wide
        fires = wide.values > self.threshold[wide.indices.long()]
        return _only(wide, fires), wide


def _only(code: SparseFeatures, keep: Tensor) -> SparseFeatures:
    kept = torch.cat((keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)))
    return SparseFeatures(kept[code.offsets], code.indices[keep], code.values[keep], code.d_sae)


def thresholds(sae: Dictionary) -> Float[Tensor, " d_sae"]:
    """The value above which each feature fires `[d_sae]`; 0 where the activation has none."""
    if isinstance(sae, SAE) and isinstance(sae.activation, ReLU | TopK):
        return torch.zeros(sae.d_sae)
    found = WithNearMisses(sae, 1.0).threshold
    return torch.zeros(sae.d_sae) if found is None else found.cpu()
