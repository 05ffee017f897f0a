"""The loss that brings dead features back (2406.04093).

The largest `k` pre-activations of dead features on each token, a ReLU applied, reconstruct what the
living leave over; the loss is the share of it that they miss. What is left over is a constant here:
it teaches the living nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.sae import Encoder, TopK

from ._blocks import Asks, SparseBlock


@dataclass(frozen=True, slots=True)
class AuxGradients:
    """Gradients of the auxiliary loss, for the rows of dead features."""

    features: Int[Tensor, " n_dead"]
    w_enc: Float[Tensor, "n_dead d_in"]
    b_enc: Float[Tensor, " n_dead"]
    w_dec: Float[Tensor, "n_dead d_out"]
    loss: float


def revive(
    x: Float[Tensor, "batch d_in"],
    centre: Float[Tensor, " d_in"] | None,
    left: Float[Tensor, "batch d_out"],
    w_enc: Float[Tensor, "n_features d_in"],
    bias: Float[Tensor, " n_features"],
    w_dec: Float[Tensor, "n_features d_out"],
    dead: Int[Tensor, " n_dead"],
    *,
    k: int,
    coefficient: float,
) -> AuxGradients:
    """Gradients by which the features `dead` learn to reconstruct `left`."""
    rows = w_dec[dead]
    code = Encoder(w_enc[dead].T, bias[dead], TopK(k), keep=False).encode(x)
    block = SparseBlock(code, 0, None)
    size = left.square().sum(dtype=torch.float64).clamp_min(1e-30)
    error = block.decode(rows) - left
    g = error * (2 * coefficient / size).float()
    block.backward(g, rows, Asks(g.new_zeros(len(g)), None, 0.0))
    return AuxGradients(
        features=dead,
        w_enc=block.encoder_rows(0, len(dead), x if centre is None else x - centre),
        b_enc=block.bias_gradient,
        w_dec=block.decoder_rows(0, len(dead), g),
        loss=float(coefficient * error.square().sum(dtype=torch.float64) / size),
    )
