"""Encoding in tiles of features: any width, sparse out, the float32 answer.

Weights `[d_in, d_sae]` are read a tile of features at a time, straight from wherever they lie, so
that neither a converted copy of them nor all pre-activations ever exist. Where the processor
multiplies bfloat16 faster, a tile is screened in it first, and only the few pre-activations that
may exceed their threshold are computed in float32; the screen's margin is a bound of its error, so
nothing is missed, and what fires is decided in float32 alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError

from ._activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from ._kernels import entries, support
from ._scratch import Scratch
from ._screen import Screen, feature_bytes, lowered, screens_pay
from ._sparse import SparseFeatures

_TILE_BYTES = 32 * 2**20
"""Float32 weights, and float32 pre-activations, of one tile at most."""
_TILE_STEP = 256
"""Features of the smallest tile."""
_CHUNK = 4_096
"""Tokens encoded at a time."""
_HELD_BYTES = 2**30
"""Screens that are kept between calls, of one encoder."""
_FEW = 64
"""Tokens for which preparing a screen costs more than it saves."""
_FEW_ANEW = 512
"""The same where screens are too large to be kept, and are prepared each time."""


@dataclass(eq=False)
class Encoder:
    """`activation(x @ w_enc + b_enc)`, `w_enc [d_in, d_sae]` in any float type."""

    w_enc: Tensor
    b_enc: Tensor
    activation: Activation
    keep: bool = True
    """Whether screens are kept for the next call: not worth it where the weights will change."""

    def __post_init__(self):
        self._screens: dict[int, Screen] = {}
        self._screened = self._writes

    def encode(self, x: Float[Tensor, "n_tokens d_in"]) -> SparseFeatures:
        """The features of every token of `x`."""
        if x.numel() and not all(end.isfinite() for end in torch.aminmax(x)):
            raise InputError(
                "activations hold NaN or infinity: the model has overflowed; "
                "load it in bfloat16 or float32"
            )
        match self.activation:
            case JumpReLU(threshold):
                # A negative threshold would let negative pre-activations through; the reference
                # implementations apply a ReLU first.
                return self._encode_above(x, threshold.float().clamp_min(0))
            case ReLU():
                return self._encode_above(x, torch.zeros_like(self.b_enc, dtype=torch.float32))
            case TopK(k):
                return self._encode_top_k(x, k)
            case BatchTopK(k):
                return self._encode_batch_top_k(x, k)

    def _encode_above(self, x: Tensor, threshold: Tensor) -> SparseFeatures:
        scratch = self._scratch(x)
        if scratch is not None:
            fused = support(x, self.w_enc.T, self.b_enc.float(), threshold)
            if fused is not None:
                return fused
        low = None if scratch is None or not self._screens_pay(len(x)) else lowered(x)
        rows, columns, values = [], [], []
        # Screens are kept, so their tiles are the same for any number of tokens.
        for first, stop in self._tiles(len(x) if low is None else _CHUNK):
            above = threshold[first:stop]
            if low is not None and scratch is not None:
                screen = self._screen(first, stop, above, scratch)
                found = screen.entries(x, low, scratch)
                kept = found.values > above[found.columns]
                r, c, v = found.rows[kept], found.columns[kept], found.values[kept]
            else:
                pre = self._pre(x, first, stop, scratch)
                may = None if scratch is None else scratch("may", len(x), stop - first, torch.bool)
                r, c = entries(torch.gt(pre, above, out=may))
                v = pre[r, c]
            rows.append(r)
            columns.append(c + first)
            values.append(v)
        return _gathered(rows, columns, values, len(x), self.w_enc.shape[1])

    def _scratch(self, x: Tensor) -> Scratch | None:
        """Memory for tiles, but none where gradients flow: they hold on to what was computed."""
        wanted = any(t.requires_grad for t in (x, self.w_enc, self.b_enc))
        return None if wanted and torch.is_grad_enabled() else Scratch(x.device)

    @property
    def _keeps(self) -> bool:
        d_in, d_sae = self.w_enc.shape
        return self.keep and feature_bytes(d_in) * d_sae <= _HELD_BYTES

    def _screens_pay(self, n_tokens: int) -> bool:
        few = _FEW if self._keeps else _FEW_ANEW
        return n_tokens >= few and screens_pay(self.w_enc.device)

    def _screen(self, first: int, stop: int, above: Tensor, scratch: Scratch) -> Screen:
        if self._screened != self._writes:
            self._screens.clear()
            self._screened = self._writes
        if first in self._screens:
            return self._screens[first]
        bias = self.b_enc[first:stop].float()
        screen = Screen.of(self.w_enc[:, first:stop], bias, above, scratch, once=not self._keeps)
        if self._keeps:
            screen = self._screens[first] = screen.kept()
        return screen

    @property
    def _writes(self) -> tuple[int, ...]:
        """How often the weights have been written in place: screens hold copies of them."""
        tensors = [self.w_enc, self.b_enc]
        if isinstance(self.activation, JumpReLU):
            tensors.append(self.activation.threshold)
        return tuple(t._version for t in tensors if not t.is_inference())

    def _encode_top_k(self, x: Tensor, k: int) -> SparseFeatures:
        k, scratch = min(k, self.w_enc.shape[1]), self._scratch(x)
        best, place = x.new_zeros(len(x), 0), x.new_zeros(len(x), 0, dtype=torch.int64)
        for first, stop in self._tiles(len(x)):
            pre = self._pre(x, first, stop, scratch)
            some = pre.topk(min(k, stop - first), dim=1, sorted=False)
            best = torch.cat((best, some.values), 1)
            place = torch.cat((place, some.indices + first), 1)
            if best.shape[1] > k:
                chosen = best.topk(k, dim=1, sorted=False)
                best, place = chosen.values, place.gather(1, chosen.indices)
        place, order = place.sort(dim=1)
        best = best.gather(1, order)
        rows, columns = (best > 0).nonzero(as_tuple=True)
        return SparseFeatures.from_entries(
            rows, place[rows, columns], best[rows, columns], len(x), self.w_enc.shape[1]
        )

    def _encode_batch_top_k(self, x: Tensor, k: int) -> SparseFeatures:
        # The largest entries of the whole batch are among the largest of each tile.
        wanted, d_sae, scratch = k * len(x), self.w_enc.shape[1], self._scratch(x)
        places, values = x.new_zeros(0, dtype=torch.int64), x.new_zeros(0)
        for first, stop in self._tiles(len(x)):
            flat = self._pre(x, first, stop, scratch).reshape(-1)
            some = flat.topk(min(wanted, flat.numel()), sorted=False)
            place = some.indices // (stop - first) * d_sae + some.indices % (stop - first) + first
            values, places = torch.cat((values, some.values)), torch.cat((places, place))
            keep = values.topk(min(wanted, len(values)), sorted=False).indices
            values, places = values[keep], places[keep]
        order = places[values > 0].argsort()
        values, places = values[values > 0][order], places[values > 0][order]
        return SparseFeatures.from_entries(places // d_sae, places % d_sae, values, len(x), d_sae)

    def _pre(self, x: Tensor, first: int, stop: int, scratch: Scratch | None) -> Tensor:
        """Pre-activations of a tile, which last until `scratch` is used again."""
        weights, bias = self.w_enc[:, first:stop], self.b_enc[first:stop].float()
        if scratch is None:
            return torch.addmm(bias, x, weights.float())
        if weights.dtype != torch.float32:
            weights = scratch("weights", *weights.shape).copy_(weights)
        return torch.addmm(bias, x, weights, out=scratch("pre", len(x), stop - first))

    def _tiles(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        d_in, d_sae = self.w_enc.shape
        fits = _TILE_BYTES // (4 * max(d_in, n_tokens, 1))
        tile = max(_TILE_STEP, fits // _TILE_STEP * _TILE_STEP)
        for first in range(0, d_sae, tile):
            yield first, min(first + tile, d_sae)


def in_chunks(
    encode: Callable[[Tensor], SparseFeatures], x: Float[Tensor, "n_tokens ..."], size: int = _CHUNK
) -> SparseFeatures:
    """`encode` applied to `size` tokens at a time."""
    return SparseFeatures.join([encode(some) for some in x.split(size)])


def _gathered(
    rows: list[Tensor], columns: list[Tensor], values: list[Tensor], n_tokens: int, d_sae: int
) -> SparseFeatures:
    """Entries of tiles, in the order of features, as one code in the order of tokens."""
    if len(rows) == 1:
        return SparseFeatures.from_entries(rows[0], columns[0], values[0], n_tokens, d_sae)
    row = torch.cat(rows)
    row, order = row.sort(stable=True)
    return SparseFeatures.from_entries(
        row, torch.cat(columns)[order], torch.cat(values)[order], n_tokens, d_sae
    )
