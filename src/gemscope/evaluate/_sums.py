"""Sums over documents, from which every figure and its interval is made.

Each figure is a ratio of sums over tokens. The sums are kept per document in float64, so that a
figure over all documents is exact, and an interval comes from resampling whole documents: tokens
of one document are not independent.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Num
from torch import Tensor

Formula = Callable[[dict[str, np.ndarray]], np.ndarray | np.floating]
"""A figure as a function of sums."""

_RESAMPLES = 1_000


class DocumentSums:
    """Named sums per document, grown as documents appear."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.table = np.zeros((0, len(names)))

    def add(self, documents: Int[Tensor, " n"], **values: Num[Tensor, " n"]) -> None:
        """Add token values `[n]`, given by name, to the documents `[n]` they belong to."""
        index = documents.cpu().numpy()
        if len(index) == 0:
            return
        if (short := int(index.max()) + 1 - len(self.table)) > 0:
            self.table = np.concatenate([self.table, np.zeros((short, len(self.names)))])
        for name, value in values.items():
            weights = value.double().cpu().numpy()
            self.table[:, self.names.index(name)] += np.bincount(
                index, weights=weights, minlength=len(self.table)
            )

    def total(self, name: str) -> float:
        """Sum over all documents."""
        return float(self.table[:, self.names.index(name)].sum())

    def ratio(self, above: str, below: str) -> float:
        """Ratio of two totals."""
        return self.total(above) / self.total(below)

    def intervals(
        self, figures: dict[str, Formula], *, seed: int
    ) -> dict[str, tuple[float, float] | None]:
        """95% intervals of `figures`, by resampling documents; none with a single document."""
        table = self.table[self.table.any(1)]
        if len(table) < 2:
            return dict.fromkeys(figures)
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), _RESAMPLES)
        drawn = weights @ table
        columns = {name: drawn[:, i] for i, name in enumerate(self.names)}
        out: dict[str, tuple[float, float] | None] = {}
        for name, formula in figures.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.asarray(formula(columns))
            # A figure that is not defined (nothing to recover, say) has no interval either.
            values = values[np.isfinite(values)]
            low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
            out[name] = (float(low), float(high)) if len(values) else None
        return out
