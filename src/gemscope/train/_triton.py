"""Adam on the rows of a matrix on CUDA, in one kernel: what `Adam.rows` does there in a dozen.

A row's gradient, weights and moments are read once and written once, the rest happens in
registers. Triton comes with torch's CUDA builds and is imported by nothing else: import this file
only where it runs.
"""

from contextlib import nullcontext
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

WIDEST = 8_192
"""The longest row: a program holds all of one."""


# `no_type_check` keeps the shape checks of the tests out of what Triton compiles.
@triton.jit
@no_type_check
def _adam_row(
    p, p_stride, g, g_stride, v, v_stride, m, m_stride, d,
    lr, root, beta1, rest1, beta2, rest2, eps,
    UNIT: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < d
    of_p, of_v = p + row * p_stride + place, v + row * v_stride + place
    weight = tl.load(of_p, mask=inside, other=0.0)
    gradient = tl.load(g + row * g_stride + place, mask=inside, other=0.0)
    if UNIT:
        gradient -= tl.sum(gradient * weight) * weight
    second = tl.load(of_v, mask=inside, other=0.0) * beta2 + gradient * gradient * rest2
    tl.store(of_v, second, mask=inside)
    if FIRST:
        of_m = m + row * m_stride + place
        gradient = tl.load(of_m, mask=inside, other=0.0) * beta1 + gradient * rest1
        tl.store(of_m, gradient, mask=inside)
    # Exactly rounded, as torch's are: what Triton takes by default is not.
    weight -= lr * tl.div_rn(gradient, tl.sqrt_rn(second) * root + eps)
    if UNIT:
        length = tl.sqrt_rn(tl.sum(tl.where(inside, weight * weight, 0.0)))
        weight = tl.div_rn(weight, tl.maximum(length, 1e-12))
    tl.store(of_p, weight, mask=inside)


def adam_rows(
    p: Float[Tensor, "n d"],
    g: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    m: Float[Tensor, "n d"] | None,
    *,
    lr: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit: bool,
) -> None:
    """A step of Adam on the rows `p`, in place, with their second and first moments; `m` is None
    where `beta1` is 0. `unit` rows stay of unit length: what would only lengthen them is left out.

    `lr` and `root` hold the corrections of the moments' bias, as `Adam.begin` makes them.
    """
    n, d = p.shape
    if p.numel() == 0:
        return
    assert d <= WIDEST
    block = max(16, triton.next_power_of_2(d))
    g = g if g.stride(1) == 1 else g.contiguous()
    assert all(t.stride(1) == 1 for t in (p, v)), "rows are written in place"
    first = v if m is None else m  # not looked at without first moments
    with torch.cuda.device(p.device) if p.device.type == "cuda" else nullcontext():
        _adam_row[(n,)](
            p, p.stride(0), g, g.stride(0), v, v.stride(0), first, first.stride(0), d,
            lr, root, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            UNIT=unit, FIRST=m is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
