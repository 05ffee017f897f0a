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
from ._top import WIDE, floors, largest_of_all, largest_of_each, with_tokens

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
                return self._encode_above(x, self._zeros)
            case TopK(k):
                return self._encode_top_k(x, k)
            case BatchTopK(k):
                return self._encode_batch_top_k(x, k)

    @property
    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.b_enc, dtype=torch.float32)

    def _encode_above(
        self, x: Tensor, threshold: Tensor, floor: Tensor | None = None
    ) -> SparseFeatures:
        """The entries above `threshold [d_sae]`; with a `floor [n_tokens]`, above that instead,
        and the threshold is 0.
        """
        scratch = self._scratch(x)
        if scratch is not None:
            fused = support(x, self.w_enc.T, self.b_enc.float(), threshold, floor)
            if fused is not None:
                return fused
        low = None if scratch is None or not self._screens_pay(len(x)) else lowered(x, floor)
        rows, columns, values = [], [], []
        # Where screens are kept, their tiles are the same for any number of tokens.
        for first, stop in self._tiles(_CHUNK if low is not None and self._keeps else len(x)):
            above = threshold[first:stop]
            if low is not None and scratch is not None:
                screen = self._screen(first, stop, above, scratch)
                found = screen.entries(x, low, scratch)
                least = above[found.columns] if floor is None else floor[found.rows]
                kept = (found.values > least).nonzero().squeeze(1)
                r, c, v = found.rows[kept], found.columns[kept], found.values[kept]
            else:
                pre = self._pre(x, first, stop, scratch)
                may = None if scratch is None else scratch("may", len(x), stop - first, torch.bool)
                least = above if floor is None else floor[:, None]
                r, c = entries(torch.gt(pre, least, out=may))
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
        k = min(k, self.w_enc.shape[1])
        floor = self._floors(x, k, whole_batch=False)
        if floor is None:
            return self._sort_each(x, k)
        found = self._encode_above(x, self._zeros, floor)
        code = largest_of_each(found, k)
        # Above a floor of 0 is all that may be chosen.
        short = ((found.counts < k) & (floor != 0)).nonzero().squeeze(1)
        return with_tokens(code, short, self._sort_each(x[short], k)) if len(short) else code

    def _encode_batch_top_k(self, x: Tensor, k: int) -> SparseFeatures:
        floor = self._floors(x, k, whole_batch=True)
        if floor is None:
            return self._sort_all(x, k)
        found, wanted = self._encode_above(x, self._zeros, floor), k * len(x)
        if found.values.numel() >= wanted:
            return largest_of_all(found, wanted)
        return found if not floor[0] else self._sort_all(x, k)

    def _floors(self, x: Tensor, k: int, *, whole_batch: bool) -> Tensor | None:
        """Where to look for the largest; None where sorting everything is better."""
        if len(x) < _FEW or self.w_enc.shape[1] < WIDE or self._scratch(x) is None:
            return None
        return floors(x, self.w_enc, self.b_enc, k, whole_batch=whole_batch)

    def _sort_each(self, x: Tensor, k: int) -> SparseFeatures:
        scratch = self._scratch(x)
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

    def _sort_all(self, x: Tensor, k: int) -> SparseFeatures:
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
    counts = torch.stack([torch.bincount(r, minlength=n_tokens) for r in rows])
    offsets = torch.cat((counts.new_zeros(1), counts.sum(0).cumsum(0)))
    # Where the entries of a tile go: behind those of tokens before, and of tiles before. No sort.
    shift = offsets[:-1] + counts.cumsum(0) - counts - (counts.cumsum(1) - counts)
    index = torch.empty(int(offsets[-1]), dtype=torch.int32, device=offsets.device)
    value = torch.empty(len(index), device=offsets.device)
    for r, c, v, s in zip(rows, columns, values, shift, strict=True):
        place = s[r].add_(torch.arange(len(r), device=r.device))
        index[place], value[place] = c.int(), v.float()
    return SparseFeatures(offsets, index, value, d_sae)
