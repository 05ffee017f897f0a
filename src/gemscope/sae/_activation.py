"""Activation functions: from pre-activations to the features that fire.

Each maps pre-activations `[n_tokens, d_sae]` in float32 to a mask of the entries that are kept;
kept entries keep their value. `JumpReLU` is the function of 2407.14435: `z` where `z > threshold`,
strictly, and 0 elsewhere; it is not `max(0, z - threshold)`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class JumpReLU:
    """Features above their own threshold: `z > threshold`, and positive."""

    threshold: Float[Tensor, " d_sae"]

    def mask(self, pre: Float[Tensor, "n_tokens d_sae"]) -> Bool[Tensor, "n_tokens d_sae"]:
        """True where a feature fires."""
        # A negative threshold would let negative pre-activations through; the reference
        # implementations apply a ReLU first.
        return pre > self.threshold.clamp_min(0)


@dataclass(frozen=True, slots=True)
class ReLU:
    """Positive pre-activations."""

    def mask(self, pre: Float[Tensor, "n_tokens d_sae"]) -> Bool[Tensor, "n_tokens d_sae"]:
        """True where a feature fires."""
        return pre > 0


@dataclass(frozen=True, slots=True)
class TopK:
    """The `k` largest pre-activations of a token, as far as they are positive."""

    k: int

    def mask(self, pre: Float[Tensor, "n_tokens d_sae"]) -> Bool[Tensor, "n_tokens d_sae"]:
        """True where a feature fires."""
        chosen = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False).indices
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, chosen, True) & (pre > 0)


@dataclass(frozen=True, slots=True)
class BatchTopK:
    """The `k * n_tokens` largest pre-activations of a batch, as far as they are positive.

    What a token gets depends on the other tokens of the batch: for training. Published
    dictionaries of this kind are used as `JumpReLU` with the threshold that training measured.
    """

    k: int

    def mask(self, pre: Float[Tensor, "n_tokens d_sae"]) -> Bool[Tensor, "n_tokens d_sae"]:
        """True where a feature fires."""
        flat = pre.reshape(-1)
        chosen = flat.topk(min(self.k * len(pre), flat.numel()), sorted=False).indices
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[chosen] = True
        return mask.reshape(pre.shape) & (pre > 0)


Activation = JumpReLU | ReLU | TopK | BatchTopK
"""Chooses the entries that fire."""
