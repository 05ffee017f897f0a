"""Features on a batch, forward and backward, in exact products: sparse ones, or dense.

A block is a run of features of one layer that share the gradient `g` of what they write. With
support `S` the entries that fire and, for JumpReLU, those within half a bandwidth of firing,

    df = g w_dec^T on S        dz = (df + c) 1[fires]
    dtheta_i = -(1 / bandwidth) sum over b of K_bi (theta_i df_bi + p_b + q_i)
    dw_dec = f^T g             dw_enc = dz^T (x - centre)             db_enc = sum of dz

where `K = 1[|z - theta| < bandwidth / 2]`, `c` is the derivative of the loss by a feature's value,
`p_b + q_i` that by its firing (2407.14435; `dz` takes nothing from the step). `K` reaches below the
threshold as well: a step that only sees what fires halves and biases the gradient. Entries below
zero belong to neither, as if a ReLU came first.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.sae import SparseFeatures, sampled_products, weighted_sums


@dataclass(frozen=True, slots=True)
class Asks:
    """What a loss asks of features beside reconstruction: its derivatives."""

    by_token: Float[Tensor, " batch"]
    """By the firing of any feature on a token."""
    by_feature: Float[Tensor, " n_features"] | None
    """By the firing of a feature on any token."""
    by_value: float
    """By the value of a feature that fires."""


@dataclass(frozen=True, slots=True)
class Window:
    """The straight-through window of a block: None of it for activations without thresholds."""

    threshold: Float[Tensor, " n_features"]
    bandwidth: float


class SparseBlock:
    """Through its entries: time and memory go with their number, not with that of features."""

    def __init__(self, support: SparseFeatures, first: int, window: Window | None):
        self.first, self.stop = first, first + support.d_sae
        self._support, self._window = support, window
        self._columns = support.indices.long()
        self._fires: Tensor | None = None
        if window is not None:
            fires = support.values > window.threshold[self._columns]
            # Places, not truth values: those would be searched anew by all that they choose from.
            self._fires = None if bool(fires.all()) else fires.nonzero().squeeze(1)
        code = support
        if self._fires is not None:
            kept = self._fires
            code = SparseFeatures.from_entries(
                support.rows[kept], self._columns[kept], support.values[kept],
                support.n_tokens, support.d_sae,
            )  # fmt: skip
        self._code, self._dz = code, torch.empty(0)

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """Features that fire on each token."""
        return self._code.counts

    @cached_property
    def fired(self) -> Int[Tensor, " n_features"]:
        """Tokens on which each feature fires."""
        return torch.bincount(self._code.indices, minlength=self._code.d_sae)

    @property
    def support(self) -> int:
        """Entries that take part in a step."""
        return self._columns.numel()

    @property
    def total(self) -> float:
        """Sum of all features' values."""
        return float(self._code.values.sum(dtype=torch.float64))

    def decode(self, rows: Float[Tensor, "n_features d"]) -> Float[Tensor, "batch d"]:
        """`f @ rows`."""
        code = self._code
        return weighted_sums(code.offsets, code.indices.long(), code.values, rows)

    def backward(
        self, g: Float[Tensor, "batch d"], rows: Float[Tensor, "n_features d"], asks: Asks
    ) -> Float[Tensor, " n_features"]:
        """Work out `dz`; the gradient of the thresholds."""
        columns = self._columns
        df = sampled_products(self._support.offsets, columns, g, rows)
        dtheta = rows.new_zeros(len(rows))
        if self._window is not None:
            theta, width = self._window.threshold, self._window.bandwidth
            near = (self._support.values - theta[columns]).abs() < width / 2
            places = near.nonzero().squeeze(1)
            at = columns[places]
            jump = theta[at] * df[places] + asks.by_token[self._support.rows[places]]
            if asks.by_feature is not None:
                jump += asks.by_feature[at]
            dtheta.index_add_(0, at, jump, alpha=-1 / width)
        self._dz = (df if self._fires is None else df[self._fires]) + asks.by_value
        return dtheta

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets, tokens, values and `dz` of the entries that fire, feature by feature."""
        _, order = self._code.indices.sort(stable=True)
        offsets = torch.cat((self.fired.new_zeros(1), self.fired.cumsum(0)))
        return offsets, self._code.rows[order], self._code.values[order], self._dz[order]

    @cached_property
    def bias_gradient(self) -> Float[Tensor, " n_features"]:
        """Sums of `dz`."""
        offsets, _, _, dz = self._by_feature
        places = torch.zeros_like(dz, dtype=torch.int64)
        return weighted_sums(offsets, places, dz, dz.new_ones(1, 1)).squeeze(1)

    def encoder_rows(
        self, start: int, stop: int, x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "n d_in"]:
        """`dz^T x` of some of the block's features."""
        return self._sums(start, stop, self._by_feature[3], x)

    def decoder_rows(
        self, start: int, stop: int, g: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "n d"]:
        """`f^T g` of some of the block's features."""
        return self._sums(start, stop, self._by_feature[2], g)

    def _sums(self, start: int, stop: int, values: Tensor, table: Tensor) -> Tensor:
        offsets, tokens, _, _ = self._by_feature
        if (start, stop) == (0, len(offsets) - 1):
            return weighted_sums(offsets, tokens, values, table)
        some = offsets[start : stop + 1]
        entries = slice(int(some[0]), int(some[-1]))
        return weighted_sums(some - some[0], tokens[entries], values[entries], table)


class DenseBlock:
    """Through dense products: the faster way while many features fire.

    Masks are numbers: adding up truth values, or multiplying by them, converts them each time.
    """

    def __init__(self, z: Float[Tensor, "batch n_features"], first: int, window: Window):
        self.first, self.stop = first, first + z.shape[1]
        self._z, self._window = z, window
        self._fires = (z > window.threshold.clamp_min(0)).to(z.dtype)
        self._f = z * self._fires
        self._dz = torch.empty(0)

    @cached_property
    def counts(self) -> Int[Tensor, " batch"]:
        """Features that fire on each token."""
        return self._fires.sum(1).long()

    @cached_property
    def fired(self) -> Int[Tensor, " n_features"]:
        """Tokens on which each feature fires."""
        return self._fires.sum(0).long()

    @cached_property
    def _near(self) -> Float[Tensor, "batch n_features"]:
        """1 within half a bandwidth of the threshold, and above 0."""
        theta, half = self._window.threshold, self._window.bandwidth / 2
        near = ((self._z - theta).abs_() < half).to(self._z.dtype)
        return near if bool((theta >= half).all()) else near.mul_(self._z > 0)

    @property
    def support(self) -> int:
        """Entries that would take part in a sparse step, or a few more: near ones that fire count
        twice.
        """
        near = self._near.sum() if self._window.bandwidth else 0
        return int(self._fires.sum() + near)

    @property
    def total(self) -> float:
        """Sum of all features' values."""
        return float(self._f.sum(dtype=torch.float64))

    def decode(self, rows: Float[Tensor, "n_features d"]) -> Float[Tensor, "batch d"]:
        """`f @ rows`."""
        return self._f @ rows

    def backward(
        self, g: Float[Tensor, "batch d"], rows: Float[Tensor, "n_features d"], asks: Asks
    ) -> Float[Tensor, " n_features"]:
        """Work out `dz`; the gradient of the thresholds."""
        df = g @ rows.T
        theta, width = self._window.threshold, self._window.bandwidth
        dtheta = torch.zeros_like(theta)
        if width:
            near = self._near
            dtheta = (near * df).sum(0) * theta + asks.by_token @ near
            if asks.by_feature is not None:
                dtheta += asks.by_feature * near.sum(0)
            dtheta *= -1 / width
        if asks.by_value:
            df += asks.by_value
        self._dz = df.mul_(self._fires)
        return dtheta

    @cached_property
    def bias_gradient(self) -> Float[Tensor, " n_features"]:
        """Sums of `dz`."""
        return self._dz.sum(0)

    def encoder_rows(
        self, start: int, stop: int, x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "n d_in"]:
        """`dz^T x` of some of the block's features."""
        return self._dz[:, start:stop].T @ x

    def decoder_rows(
        self, start: int, stop: int, g: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "n d"]:
        """`f^T g` of some of the block's features."""
        return self._f[:, start:stop].T @ g


Block = SparseBlock | DenseBlock
"""Features `first` to `stop` of a layer on a batch, either way."""
