"""JumpReLU and its step with straight-through gradients for the threshold (2407.14435).

With `H = 1[z > theta]`, the rectangle `K = 1[|z - theta| < bandwidth / 2]` and incoming gradients
`g_f` and `g_H`:

    f = z H      dL/dz = g_f H      dL/dtheta = -(theta / bandwidth) sum_b g_f K
    H            dL/dz = 0          dL/dtheta = -(1 / bandwidth) sum_b g_H K

`K` reaches below the threshold as well: features that are silent by a little count, and leaving
them out (as a step that only sees `f` must) halves and biases the gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = (z > threshold).to(z.dtype)
        ctx.save_for_backward(z, threshold, active)
        ctx.bandwidth = bandwidth
        return z * active, active

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_features, of_steps = gradients
        z, threshold, active = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.bandwidth / 2
        jump = threshold * of_features + of_steps
        return of_features * active, -(jump * window).sum(0) / ctx.bandwidth, None


def jumprelu(
    z: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
    """Feature activations, and 1 where a feature fires; both move the threshold."""
    return _JumpReLU.apply(z, threshold, bandwidth)
