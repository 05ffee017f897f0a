"""Which pre-activations may exceed their threshold, found in bfloat16.

With `x = xb + dx` and `w = wb + dw`, the halves with b rounded to bfloat16,

    |x . w - xb . wb| <= |dx| |w| + |xb| |dw|

by Cauchy and Schwarz. Adding float32 products in any order errs by at most `(d + 8) 2^-24` of the
sum of their sizes, itself at most `|x| |w|`. Margin, bias and threshold are appended to the product
as columns of their own, so that one bfloat16 product says by its sign what may fire: rounding its
result cannot change a sign. All of this holds where products and sums stay in float32's range;
below it, at `2^-126`, units for bfloat16 take what is left for 0.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from ._kernels import positive, row_offsets, sampled_products
from ._scratch import Scratch

_UP = 1 + 2**-7
"""Factor after which rounding to bfloat16 cannot round below."""
_LARGEST = 2.0**126
"""Where biases and thresholds end: two infinities may make no number, which would fire nothing."""
_ROUNDING = 2.0**-8
"""Share of a number that rounding it to bfloat16 may take or give, above `2^-126`."""
_MANY = 1 / 16
"""Share of a tile from which on computing all of it in float32 is faster than entry by entry."""
_COLUMNS = 5
"""Columns that are appended: two of the margin, two of bias and threshold, one of the floor."""
_PAD = 32
"""Products are fastest where their length is a multiple of this."""


class Entries(NamedTuple):
    """Places that may fire, in the order of tokens, with their pre-activations in float32."""

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Screen:
    """One tile of an encoder, ready to be screened."""

    weights: Tensor
    """`[width, d_in]` float32."""
    bias: Tensor
    low: Tensor
    """`[width, d_in + columns]` bfloat16: the weights, and what the margin needs."""

    @classmethod
    def of(
        cls,
        w_enc: Float[Tensor, "d_in width"],
        bias: Float[Tensor, " width"],
        threshold: Float[Tensor, " width"],
        scratch: Scratch,
        *,
        once: bool = False,
    ) -> "Screen":
        """The screen of a tile of `w_enc`, which lasts until `scratch` is used again.

        One that is to be used once is made faster, with a wider margin.
        """
        d_in, width = w_enc.shape
        rows = scratch("rows", d_in, width)
        if w_enc.dtype == torch.float32 and w_enc.T.is_contiguous():
            weights = w_enc.T
        else:
            # A copy of the rows first: transposing is far slower out of a wide matrix.
            weights = scratch("weights", width, d_in).copy_(rows.copy_(w_enc).T)
        low = scratch("low", width, _low_width(d_in), torch.bfloat16)
        low[:, :d_in].copy_(weights)
        lengths = _lengths(weights)
        if once:
            # Each entry is rounded by a 256th of itself at most: no second look at them all.
            lost = lengths * _ROUNDING
        else:
            lost = _lengths(rows.view(width, d_in).copy_(low[:, :d_in]).sub_(weights))
        slack = 2 * _sum_error(d_in) + 2**-15
        lift = bias + bias.abs() * slack - threshold * (1 - slack)
        lift = lift.clamp(-_LARGEST, _LARGEST)
        head = lift.bfloat16()
        _append(low, d_in, (_up(lengths), _up(lost), head, lift - head, torch.ones_like(lift)))
        return cls(weights, bias, low)

    def kept(self) -> "Screen":
        """The same in memory of its own."""
        return Screen(self.weights.clone(), self.bias, self.low.clone())

    def entries(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        low: BFloat16[Tensor, "n_tokens d_low"],
        scratch: Scratch,
    ) -> Entries:
        """What may fire on the tokens of `x`, given `low = lowered(x)`."""
        shape = len(x), len(self.weights)
        signs = torch.mm(low, self.low.T, out=scratch("signs", *shape, torch.bfloat16))
        rows, places = positive(signs)
        if len(rows) > _MANY * signs.numel():
            whole = torch.mm(x, self.weights.T, out=scratch("pre", *shape))
            products = whole[rows, places]
        else:
            offsets = row_offsets(rows, len(x))
            products = sampled_products(offsets, places, x, self.weights)
        return Entries(rows, places, products + self.bias[places])


def feature_bytes(d_in: int) -> int:
    """Memory of a screen for each of its features."""
    return 4 * d_in + 2 * _low_width(d_in)


def lowered(
    x: Float[Tensor, "n_tokens d_in"], floor: Float[Tensor, " n_tokens"] | None = None
) -> BFloat16[Tensor, "n_tokens d_low"]:
    """Tokens in bfloat16, with what the margin needs: the other half of every screen. What does not
    exceed the `floor` of its token, at least 0, need not be found.
    """
    n_tokens, d_in = x.shape
    low = x.new_empty(n_tokens, _low_width(d_in), dtype=torch.bfloat16)
    rounded = low[:, :d_in].copy_(x).float()
    # Three sums err: the screen's own, the float32 one it stands for, and the margin's.
    sums, ones = 3 * _sum_error(d_in), x.new_ones(n_tokens)
    lengths = _lengths(rounded) * (1 + sums)
    margin = _lengths(rounded.sub_(x)) + sums * _lengths(x)
    # Less by what adding it, and rounding it, may add to it.
    least = x.new_zeros(n_tokens) if floor is None else floor * (1 - 2 * sums - 2 * _ROUNDING)
    _append(low, d_in, (_up(margin), _up(lengths), ones, ones, -least.clamp_max(_LARGEST)))
    return low


def _lengths(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Lengths of `rows`, no smaller than they are but for float32's last digits."""
    # Squares below float32's range are lost. Nor is a length 0: times an infinite one that would
    # be no number.
    return rows.norm(dim=1) + rows.shape[1] ** 0.5 * 2.0**-63


def _up(column: Tensor) -> Tensor:
    return column * _UP


def _sum_error(terms: int) -> float:
    return (terms + 8) * 2.0**-24


def _low_width(d_in: int) -> int:
    return -(-(d_in + _COLUMNS) // _PAD) * _PAD


def _append(low: Tensor, d_in: int, columns: tuple[Tensor, ...]) -> None:
    low[:, d_in : d_in + _COLUMNS] = torch.stack(columns, dim=1)
    low[:, d_in + _COLUMNS :] = 0


@cache
def screens_pay(device: torch.device) -> bool:
    """Whether bfloat16 products are much faster than float32 ones on `device`."""
    if device.type != "cpu":
        return False  # not measured: float32 products are the safe answer there
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every version
    return supported is not None and bool(supported())
