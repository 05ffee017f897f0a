"""Products with sparse codes on CUDA, fused, in Triton: what `_kernels` does there.

Sums are float32 and their order is fixed by the entries alone: nothing is added atomically, so the
same inputs give the same bits. Rows are split where they are long, after a fixed number of
entries. Nothing here has a backward.

Triton comes with torch's CUDA builds and is imported by nothing else: import this file only where
it runs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_SPLIT = 256
"""Entries that one program adds up. A feature that fires on every token has thousands."""
_UNROLL = 4
"""Rows of the table that are on their way at the same time."""
_WIDTH = 512
"""Numbers of a row that one program sums: 16 bytes for each of its threads."""
_ENTRIES, _DEEP = 16, 128
"""Entries whose products one program forms, and the terms it forms at a time: a warp's line."""


def on(device: torch.device) -> AbstractContextManager:
    """Where kernels are launched: Triton takes the current device, not that of its tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# `no_type_check` keeps the shape checks of the tests out of what Triton compiles.
@triton.jit
@no_type_check
def _sum_of_entries(
    begin, end, indices, values, table, stride, place, inside,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The entries `begin` to `end` times their rows of the table, added in their order."""
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(begin, end, UNROLL):
        for step in tl.static_range(UNROLL):
            entry = first + step
            there = entry < end
            index = tl.load(indices + entry, mask=there, other=0).to(tl.int64)
            value = tl.load(values + entry, mask=there, other=0.0)
            row = tl.load(table + index * stride + place, mask=inside & there, other=0.0)
            total += value * row.to(tl.float32)
    return total


@triton.jit
@no_type_check
def _sum_pieces(
    offsets, pieces, owners, n_rows, indices, values, table, stride, out, d,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Each piece of a long row but its first: `pieces[r]` is the number of those before row `r`."""
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(owners + piece)
    if row < n_rows:
        place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        nth = piece - tl.load(pieces + row) + 1
        begin = tl.load(offsets + row) + nth * SPLIT
        end = tl.minimum(begin + SPLIT, tl.load(offsets + row + 1))
        total = _sum_of_entries(
            begin, end, indices, values, table, stride, place, place < d, WIDTH, UNROLL
        )
        tl.store(out + piece * d + place, total, mask=place < d)


@triton.jit
@no_type_check
def _sum_rows(
    offsets, pieces, parts, indices, values, table, stride, out, d,
    SPLIT: tl.constexpr, LONG: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Each row: its first piece, and then the sums of its others, in order."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    if LONG:
        end = tl.minimum(end, begin + SPLIT)
    total = _sum_of_entries(
        begin, end, indices, values, table, stride, place, place < d, WIDTH, UNROLL
    )
    if LONG:
        for piece in range(tl.load(pieces + row), tl.load(pieces + row + 1)):
            total += tl.load(parts + piece * d + place, mask=place < d, other=0.0)
    tl.store(out + row * d + place, total, mask=place < d)


def weighted_sums(
    offsets: Int[Tensor, " n_rows_1"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    table: Float[Tensor, "n_table d"],
) -> Float[Tensor, "n_rows d"]:
    """Sums of rows of `table`: row `r` is that over `offsets[r]:offsets[r + 1]` of
    `values * table[indices]`.

    A program for a row and some columns. Programs of the same columns run together, so that their
    part of a table of tokens stays in the cache. How many pieces long rows have is not asked, which
    would wait for the device: memory is for as many as there can be.
    """
    n_rows, d = offsets.numel() - 1, table.shape[1]
    out = table.new_empty(n_rows, d, dtype=torch.float32)
    if out.numel() == 0:
        return out
    indices, values, table = indices.contiguous(), values.contiguous(), _lined(table)
    most = indices.numel() // _SPLIT
    columns = triton.cdiv(d, _WIDTH)
    sizes = {"WIDTH": min(_WIDTH, max(16, triton.next_power_of_2(d))), "UNROLL": _UNROLL}
    inputs = indices, values, table, table.stride(0)
    pieces, parts = offsets, out  # not looked at without long rows
    with on(table.device):
        if most:
            more = (offsets.diff() - 1).clamp_min_(0) // _SPLIT
            pieces = torch.cat((more.new_zeros(1), more.cumsum(0)))
            numbers = torch.arange(most, device=offsets.device)
            owners = torch.searchsorted(pieces, numbers, right=True) - 1
            parts = out.new_empty(most, d)
            _sum_pieces[most, columns](
                offsets, pieces, owners, n_rows, *inputs, parts, d, SPLIT=_SPLIT, **sizes
            )
        _sum_rows[n_rows, columns](
            offsets, pieces, parts, *inputs, out, d, SPLIT=_SPLIT, LONG=most > 0, **sizes
        )
    return out


@triton.jit
@no_type_check
def _multiply_rows(
    rows, columns, n_entries, a, a_stride, b, b_stride, out, d,
    ENTRIES: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The products of some entries, a run of terms at a time; the terms are added at the end."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < n_entries
    left = a + tl.load(rows + entry, mask=there, other=0).to(tl.int64)[:, None] * a_stride
    right = b + tl.load(columns + entry, mask=there, other=0).to(tl.int64)[:, None] * b_stride
    total = tl.zeros([ENTRIES, DEEP], tl.float32)
    for first in range(0, d, DEEP):
        place = first + tl.arange(0, DEEP)[None, :]
        inside = there[:, None] & (place < d)
        of_a = tl.load(left + place, mask=inside, other=0.0).to(tl.float32)
        of_b = tl.load(right + place, mask=inside, other=0.0).to(tl.float32)
        total += of_a * of_b
    tl.store(out + entry, tl.sum(total, axis=1), mask=there)


def sampled_products(
    offsets: Int[Tensor, " n_a_1"],
    indices: Int[Tensor, " nnz"],
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b d"],
) -> Float[Tensor, " nnz"]:
    """`a[r] . b[indices]` for every entry of row `r`, and no others.

    A program for a fixed number of entries, not for a row: a token on which thousands of features
    fire takes no longer than they do elsewhere. Neighbouring entries share their row of `a`, which
    then comes from the nearest cache.
    """
    n = indices.numel()
    out = a.new_empty(n, dtype=torch.float32)
    if n == 0:
        return out
    a, b = _lined(a), _lined(b)
    rows = torch.arange(len(a), device=a.device).repeat_interleave(offsets.diff(), output_size=n)
    with on(a.device):
        _multiply_rows[(triton.cdiv(n, _ENTRIES),)](
            rows, indices.contiguous(), n, a, a.stride(0), b, b.stride(0), out, a.shape[1],
            ENTRIES=_ENTRIES, DEEP=_DEEP,
        )  # fmt: skip
    return out


def _lined(table: Tensor) -> Tensor:
    """`table` with the numbers of a row side by side."""
    return table if table.stride(1) == 1 else table.contiguous()
