"""What a file measured of features against what the store did."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemscope.features import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Densities of the features that both have, and that fired in both."""

    dictionary: str
    features: int
    rank_correlation: float | None
    """Spearman's, of the densities."""
    median_ratio: float | None
    """Of densities, the file's to the store's."""
    dead_there: int
    """Fired here, not there."""
    dead_here: int
    """Fired there, not here."""


def compare(store: Store, address: str, stated: Mapping[int, float]) -> Comparison | None:
    """How far densities that a file states, by feature, are those of `address`; None of none.

    A low rank correlation says that it is of another dictionary, or of another kind of text.
    """
    ours = np.array(store.features(address, ["density"])["density"].to_pylist(), dtype=np.float64)
    if not stated:
        return None
    features = np.array(list(stated), dtype=np.int64)
    theirs, here = np.array(list(stated.values()), dtype=np.float64), ours[features]
    both = (theirs > 0) & (here > 0)
    return Comparison(
        dictionary=address,
        features=len(features),
        rank_correlation=_spearman(theirs[both], here[both]),
        median_ratio=float(np.median(theirs[both] / here[both])) if both.any() else None,
        dead_there=int(((theirs == 0) & (here > 0)).sum()),
        dead_here=int(((theirs > 0) & (here == 0)).sum()),
    )


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)
