"""Which pre-activations may exceed their threshold, found in bfloat16.

With `x = xb + dx` and `w = wb + dw`, the halves with b rounded to bfloat16,

    |x . w - xb . wb| <= |dx| |w| + |xb| |dw|

by Cauchy and Schwarz. Adding float32 products in any order errs by at most `(d + 8) 2^-24` of the
sum of their sizes, itself at most `|x| |w|`. Margin, bias and threshold are appended to the product
as columns of their own, so that one bfloat16 product says by its sign what may fire: rounding its
result cannot change a sign. All of this holds where products and sums stay in float32's range;
below it, at `2^-126`, units for bfloat16 take what is left for 0.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

_UP = 1 + 2**-7
"""Factor after which rounding to bfloat16 cannot round below."""
_LARGEST = 2.0**126
"""Where columns end: infinity times 0 would be no number, and fire nothing."""
_MANY = 1 / 16
"""Share of a tile from which on computing all of it in float32 is faster than entry by entry."""
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

    @property
    def width(self) -> int:
        """Features of the tile."""
        return len(self.weights)

    @property
    def n_bytes(self) -> int:
        """Memory it holds."""
        return self.weights.nbytes + self.low.nbytes

    @classmethod
    def of(
        cls,
        w_enc: Float[Tensor, "d_in width"],
        bias: Float[Tensor, " width"],
        threshold: Float[Tensor, " width"],
    ) -> "Screen":
        """The screen of a tile of `w_enc`."""
        # A copy of the rows first: transposing is far slower out of a wide matrix.
        weights = w_enc.contiguous().T.contiguous().float()
        low = weights.bfloat16()
        slack = 2 * _sum_error(weights.shape[1]) + 2**-15
        lift = bias + bias.abs() * slack - threshold * (1 - slack)
        lift = lift.clamp(-_LARGEST, _LARGEST)
        head = lift.bfloat16()
        lost = low.float().sub_(weights)
        columns = (_up(_lengths(weights)), _up(_lengths(lost)), head, lift - head)
        return cls(weights, bias, _padded(low, columns))

    def entries(
        self, x: Float[Tensor, "n_tokens d_in"], low: BFloat16[Tensor, "n_tokens d_low"]
    ) -> Entries:
        """What may fire on the tokens of `x`, given `low = lowered(x)`."""
        may = low @ self.low.T > 0
        rows, places = may.nonzero(as_tuple=True)
        if len(rows) > _MANY * may.numel():
            products = (x @ self.weights.T)[rows, places]
        else:
            products = _products(x, self.weights, rows, places)
        return Entries(rows, places, products + self.bias[places])


def lowered(x: Float[Tensor, "n_tokens d_in"]) -> BFloat16[Tensor, "n_tokens d_low"]:
    """Tokens in bfloat16, with what the margin needs: the other half of every screen."""
    low = x.bfloat16()
    # Three sums err: the screen's own, the float32 one it stands for, and the margin's.
    sums, ones = 3 * _sum_error(x.shape[1]), x.new_ones(len(x))
    margin = _lengths(low.float().sub_(x)) + sums * _lengths(x)
    return _padded(low, (_up(margin), _up(_lengths(low.float()) * (1 + sums)), ones, ones))


def _lengths(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Lengths of `rows`, no smaller than they are but for float32's last digits."""
    # Squares below float32's range are lost.
    return rows.norm(dim=1) + rows.shape[1] ** 0.5 * 2.0**-63


def _up(column: Tensor) -> Tensor:
    return (column * _UP).clamp_max(_LARGEST)


def _sum_error(terms: int) -> float:
    return (terms + 8) * 2.0**-24


def _padded(low: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    more = -(low.shape[1] + len(columns)) % _PAD
    ends = torch.stack([c.bfloat16() for c in columns], dim=1)
    return torch.cat((low, ends, low.new_zeros(len(low), more)), 1)


def _products(x: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`x[row] . weights[column]` of every entry, entries sorted by row, in float32."""
    if len(rows) == 0:
        return x.new_zeros(0)
    counts = torch.bincount(rows, minlength=len(x))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR tensors call themselves beta
        wanted = torch.sparse_csr_tensor(
            offsets, columns, x.new_zeros(len(columns)), (len(x), len(weights)),
            check_invariants=False,
        )  # fmt: skip
        return torch.sparse.sampled_addmm(wanted, x, weights.T, beta=0.0).values()


@cache
def screens_pay(device: torch.device) -> bool:
    """Whether bfloat16 products are much faster than float32 ones on `device`."""
    if device.type != "cpu":
        return False  # not measured: float32 products are the safe answer there
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every version
    return supported is not None and bool(supported())
