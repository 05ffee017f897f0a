"""What fires, found on CUDA without ever holding all pre-activations.

A bfloat16 product runs on tensor cores, more than ten times as fast as a float32 one, which cannot,
and as three bfloat16 products, which are still not exact enough to be called float32. So, as on
other devices (`_screen.py`), a bfloat16 product says what may fire, by a bound of its error, and
those few entries are computed in float32, which decides:

    |x . w - xb . wb| <= |dx| |w| + |xb| |dw|        x = xb + dx, xb rounded to bfloat16

What may fire is kept as a bit for each entry, a 32nd of the pre-activations. Counting the bits says
where the entries of each token go; they are then written in the order of tokens and features. The
product is computed once.
"""

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ._sparse import SparseFeatures
from ._triton import on, sampled_products

_UP = 1 + 2**-7
"""Factor by which lengths and sizes are taken too large, for the rounding of their own sums."""
_SLACK = 2.0**-20
"""The same for biases and thresholds, each added once."""
_EPSILON = 2.0**-22
"""Rounding of a sum in tensor cores: they cut off where float32 rounds, of 16 terms at once."""
_M, _N, _K, _GROUP = 128, 128, 64, 8
"""Tile of the product, and how many rows of tiles run together to share what is in the cache."""
_LANES = 32
"""Bits of a word."""
_WORDS = 1_024
"""Words that one program looks at together."""
_BITS_BYTES = 2**29
"""Bits of tokens that are done together, at most."""
_TILE_BYTES = 2**28
"""Float32 weights that are rounded at a time."""
_MANY = 1 / 32
"""Share of entries from which on computing all of them in float32 is faster than one by one."""


# `no_type_check` keeps the shape checks of the tests out of what Triton compiles.
@triton.jit
@no_type_check
def _round_rows(
    rows, stride, low, lengths, losses, d, width, tiny, UP: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows in bfloat16, zeros behind them, and bounds of their lengths and of what was lost."""
    row = tl.program_id(0).to(tl.int64)
    squares, gaps = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(rows + row * stride + place, mask=place < d, other=0.0).to(tl.float32)
        rounded = value.to(tl.bfloat16)
        tl.store(low + row * width + place, rounded, mask=place < width)
        gap = value - rounded.to(tl.float32)
        squares += value * value
        gaps += gap * gap
    # Squares below float32's range are lost: `tiny` is no shorter than they are.
    lost = tl.sqrt(tl.sum(gaps)) * UP + tiny
    tl.store(losses + row, lost)
    tl.store(lengths + row, tl.sqrt(tl.sum(squares)) * UP + lost)


@triton.jit
@no_type_check
def _screen(
    x, x_lengths, x_losses, least, w, w_lengths, w_losses, lift, bits,
    n_tokens, n_features, width, n_words, sums,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile of the bfloat16 product, and a bit for each of its entries that may fire."""
    down, across = tl.cdiv(n_tokens, M), tl.cdiv(n_features, N)
    tile = tl.program_id(0)
    group = tile // (GROUP * across) * GROUP
    tall = tl.minimum(down - group, GROUP)
    top = group + tile % (GROUP * across) % tall
    left = tile % (GROUP * across) // tall
    row, column = top * M + tl.arange(0, M), left * N + tl.arange(0, N)
    # Tiles that stick out compute the last row again.
    own_row, own_column = tl.minimum(row, n_tokens - 1), tl.minimum(column, n_features - 1)
    deep = tl.arange(0, K)
    of_x = x + own_row.to(tl.int64)[:, None] * width + deep[None, :]
    of_w = w + own_column.to(tl.int64)[None, :] * width + deep[:, None]
    product = tl.zeros([M, N], tl.float32)
    for _ in range(0, width, K):
        product = tl.dot(tl.load(of_x), tl.load(of_w), product)
        of_x += K
        of_w += K
    w_length = tl.load(w_lengths + own_column)
    w_loss = tl.load(w_losses + own_column) + sums * w_length
    x_length, x_loss = tl.load(x_lengths + own_row), tl.load(x_losses + own_row)
    margin = x_loss[:, None] * w_length[None, :] + x_length[:, None] * w_loss[None, :]
    over = tl.load(lift + own_column)[None, :] - tl.load(least + own_row)[:, None]
    most = product + over + margin
    # What is no number may fire: infinities were rounded up to.
    may = ((most > 0) | (most != most)) & (column < n_features)[None, :]
    lanes = tl.arange(0, LANES).to(tl.uint32)[None, None, :]
    words = tl.sum(may.to(tl.uint32).reshape(M, N // LANES, LANES) << lanes, axis=2)
    word = left * (N // LANES) + tl.arange(0, N // LANES)
    there = (row < n_tokens)[:, None] & (word * LANES < n_features)[None, :]
    out = bits + row.to(tl.int64)[:, None] * n_words + word[None, :]
    tl.store(out, words.to(tl.int32, bitcast=True), mask=there)


@triton.jit
@no_type_check
def _ones(words):
    """The number of bits that are set in each of some 32-bit words."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return ((words + (words >> 16)) & 0x3F).to(tl.int32)


@triton.jit
@no_type_check
def _words(bits, row, n_words, first, WORDS: tl.constexpr):
    place = first + tl.arange(0, WORDS)
    words = tl.load(bits + row * n_words + place, mask=place < n_words, other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _count_bits(bits, n_words, counts, WORDS: tl.constexpr):
    """How many entries of each token may fire."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WORDS], tl.int32)
    for first in range(0, n_words, WORDS):
        total += _ones(_words(bits, row, n_words, first, WORDS))
    tl.store(counts + row, tl.sum(total).to(tl.int64))


@triton.jit
@no_type_check
def _list_bits(bits, n_words, offsets, columns, WORDS: tl.constexpr, LANES: tl.constexpr):
    """Write the numbers of the bits that are set, token by token, ascending."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + row)
    for first in range(0, n_words, WORDS):
        words = _words(bits, row, n_words, first, WORDS)
        counts = _ones(words)
        place = begin + (tl.cumsum(counts, axis=0) - counts)
        column = (first + tl.arange(0, WORDS)) * LANES
        begin += tl.sum(counts)
        # The lowest bit of every word, then the next: most words have none, few have several.
        for _ in range(tl.max(counts)):
            below = (words ^ (words - 1)) >> 1
            tl.store(columns + place, column + _ones(below), mask=words != 0)
            place += 1
            words = words & (words - 1)


def support(
    x: Float[Tensor, "n_tokens d"],
    w_rows: Float[Tensor, "n_features d"],
    bias: Float[Tensor, " n_features"],
    low: Float[Tensor, " n_features"],
    floor: Float[Tensor, " n_tokens"] | None = None,
) -> SparseFeatures | None:
    """The entries of `x @ w_rows.T + bias` above `low` and above their token's `floor`, at least 0;
    None where they are so many that computing everything is faster.

    The host waits twice for each run of tokens: for the number of entries that may fire, and of
    those that do. There is one run unless tokens times features are more than four billion.
    """
    n_words = triton.cdiv(len(w_rows), _LANES)
    step = max(1, _BITS_BYTES // (4 * n_words))
    parts = []
    floor = x.new_zeros(len(x), dtype=torch.float32) if floor is None else floor.contiguous()
    for some, least in zip(x.split(step), floor.split(step), strict=True):
        found = _support(some, w_rows, bias, low, least, n_words)
        if found is None:
            return None
        parts.append(found)
    return parts[0] if len(parts) == 1 else SparseFeatures.join(parts)


def _support(
    x: Tensor, w_rows: Tensor, bias: Tensor, low: Tensor, floor: Tensor, n_words: int
) -> SparseFeatures | None:
    n_tokens, n_features = len(x), len(w_rows)
    counts = torch.empty(n_tokens, dtype=torch.int64, device=x.device)
    with on(x.device):
        bits = _bits(x, w_rows, bias, low, floor, n_words)
        _count_bits[(n_tokens,)](bits, n_words, counts, WORDS=_WORDS)
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        total = int(offsets[-1])
        if total > _MANY * n_tokens * n_features:
            return None
        columns = torch.empty(total, dtype=torch.int32, device=x.device)
        _list_bits[(n_tokens,)](bits, n_words, offsets, columns, WORDS=_WORDS, LANES=_LANES)
    at = columns.long()
    values = sampled_products(offsets, columns, x, w_rows) + bias[at]
    fires = (values > low[at]) & (values > floor.repeat_interleave(counts, output_size=total))
    kept = fires.nonzero().squeeze(1)
    before = torch.cat((counts.new_zeros(1), fires.cumsum(0)))
    return SparseFeatures(before[offsets], columns[kept], values[kept], n_features)


def _bits(
    x: Tensor, w_rows: Tensor, bias: Tensor, low: Tensor, floor: Tensor, n_words: int
) -> Tensor:
    """A bit for every entry that may fire; weights are rounded some rows at a time."""
    n_tokens, d = x.shape
    bits = torch.empty(n_tokens, n_words, dtype=torch.int32, device=x.device)
    lift = bias + bias.abs() * _SLACK - low + low.abs() * _SLACK
    rounded, least = _rounded(x), floor * (1 - _SLACK)
    # Three sums err: the screen's own, the float32 one it stands for, and those of the margin.
    sums = 3 * (d + 8) * _EPSILON
    for first, stop in _tiles(len(w_rows), d):
        tiles = triton.cdiv(n_tokens, _M) * triton.cdiv(stop - first, _N)
        _screen[(tiles,)](
            *rounded, least, *_rounded(w_rows[first:stop]), lift[first:],
            bits[:, first // _LANES :], n_tokens, stop - first, rounded[0].shape[1], n_words, sums,
            M=_M, N=_N, K=_K, GROUP=_GROUP, LANES=_LANES, num_warps=8, num_stages=3,
        )  # fmt: skip
    return bits


def _tiles(n_features: int, d: int) -> Iterator[tuple[int, int]]:
    size = max(_N, _TILE_BYTES // (4 * d) // _N * _N)
    for first in range(0, n_features, size):
        yield first, min(first + size, n_features)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` in bfloat16, filled up with zeros, and bounds of lengths and losses."""
    n, d = rows.shape
    width = triton.cdiv(d, _K) * _K
    low = rows.new_empty(n, width, dtype=torch.bfloat16)
    lengths, losses = rows.new_empty(2, n, dtype=torch.float32)
    _round_rows[(n,)](
        rows, rows.stride(0), low, lengths, losses, d, width, d**0.5 * 2.0**-63,
        UP=_UP, BLOCK=min(1_024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return low, lengths, losses
