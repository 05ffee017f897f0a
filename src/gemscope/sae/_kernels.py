"""Products with sparse codes: the two that everything sparse is made of, and finding entries."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

from ._sparse import SparseFeatures

_HALVES = 4
"""Numbers of 16 bits in a word of 64 bits."""
_SIGNS = -0x7FFF_7FFF_7FFF_8000
"""The sign bit of each, as a signed word."""
_LANES = 8
"""Booleans in a word of 64 bits."""
_FEW = 64
"""Tokens for which rounding the weights, to find what fires, costs more than it saves."""


def fused(*tensors: Tensor) -> ModuleType | None:
    """The kernels for CUDA, where they run and no gradient is asked for: they have none."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wanted or not triton_runs(tensors[0].device):
        return None
    from . import _triton  # imports Triton

    return _triton


@cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and knows `device`: an NVIDIA GPU from Ampere on."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def weighted_sums(
    offsets: Int[Tensor, " n_rows_1"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    table: Float[Tensor, "n_table d"],
) -> Float[Tensor, "n_rows d"]:
    """Sums of rows of `table`: row `r` is that over `offsets[r]:offsets[r + 1]` of
    `values * table[indices]`. A sparse matrix in CSR form times a dense one, in float32; the order
    of the sums is that of the entries, always.
    """
    if kernels := fused(table, values):
        return kernels.weighted_sums(offsets, indices, values, table)
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1], dtype=torch.float32)
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def sampled_products(
    offsets: Int[Tensor, " n_a_1"],
    indices: Int[Tensor, " nnz"],
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b d"],
) -> Float[Tensor, " nnz"]:
    """`a[r] . b[indices]` for every entry of row `r`, and no others."""
    if kernels := fused(a, b):
        return kernels.sampled_products(offsets, indices, a, b)
    if indices.numel() == 0:
        return a.new_zeros(0)
    # What these products are to `weighted_sums` of them: the gradient by its values. It reads each
    # row once, in half the time of a sampled product.
    rows = torch.arange(len(a), device=a.device).repeat_interleave(
        offsets.diff(), output_size=indices.numel()
    )
    of_values = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return of_values(a, b, indices, offsets[:-1], rows, 0)


def support(
    x: Float[Tensor, "n_tokens d"],
    rows: Float[Tensor, "n_features d"],
    bias: Float[Tensor, " n_features"],
    low: Float[Tensor, " n_features"],
    floor: Float[Tensor, " n_tokens"] | None = None,
) -> SparseFeatures | None:
    """The entries of `x @ rows.T + bias` above `low` and their token's `floor`, or None where no
    kernel finds them faster than a dense product and a look through it.
    """
    if len(x) < _FEW or not rows.is_contiguous() or fused(x, rows, bias) is None:
        return None
    from ._triton_support import support as find  # imports Triton

    return find(x, rows, bias, low, floor)


def entries(mask: Bool[Tensor, "n_rows n_columns"]) -> tuple[Int[Tensor, " nnz"], ...]:
    """Rows and columns where `mask` is true, row by row, as `nonzero` gives them.

    Where few are, most words of eight are zero: looking at words first is three times as fast.
    """
    n_columns = mask.shape[1]
    if n_columns % _LANES or not mask.is_contiguous() or mask.device.type != "cpu":
        return mask.nonzero(as_tuple=True)
    words = mask.view(-1).view(torch.int64)
    places = words.nonzero().squeeze(1)
    which, lane = words[places].view(torch.bool).view(-1, _LANES).nonzero(as_tuple=True)
    flat = places[which] * _LANES + lane
    return flat // n_columns, flat % n_columns


def positive(
    signs: BFloat16[Tensor, "n_rows n_columns"],
) -> tuple[Int[Tensor, " nnz"], ...]:
    """Rows and columns of `signs` that are not negative and not -0, row by row. `signs` is lost.

    Comparing first would read and write it all once more: the sign is a bit of each lane.
    """
    n_columns = signs.shape[1]
    if n_columns % _HALVES or not signs.is_contiguous() or signs.device.type != "cpu":
        return (signs > 0).nonzero(as_tuple=True)
    words = signs.view(-1).view(torch.int64)
    # A lane of 0 may count as positive: whoever asks decides again by an exact value.
    places = words.bitwise_not_().bitwise_and_(_SIGNS).nonzero().squeeze(1)
    lanes = words[places].view(torch.int16).view(-1, _HALVES)
    which, lane = lanes.nonzero(as_tuple=True)
    flat = places[which] * _HALVES + lane
    return flat // n_columns, flat % n_columns


def row_offsets(rows: Int[Tensor, " nnz"], n_rows: int) -> Int[Tensor, " n_rows_1"]:
    """Where each row begins among entries sorted by row, and the number of all."""
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=offsets[1:])
    return offsets
