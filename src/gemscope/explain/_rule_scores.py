"""How well a rule tells where a feature fires, on documents it was not learned from.

Everything is summed by document, since tokens of one document are not independent: the interval is
that of leaving out each document in turn, with Student's t for the number of documents in effect,
and never narrower than Wilson's for as many independent tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemscope.features import Score

_Z = 1.959963984540054


@dataclass(frozen=True)
class Documents:
    """The held-out places, by document."""

    document: np.ndarray
    """Of each place, counted from 0 without gaps."""

    @cached_property
    def count(self) -> int:
        """Number of documents."""
        return int(self.document.max(initial=-1)) + 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """Places of each document."""
        return np.bincount(self.document, minlength=self.count).astype(np.float64)

    def sums(self, places: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Number of `places`, or their weights, in each document."""
        return np.bincount(self.document[places], weights, self.count).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Held:
    """A feature on held-out places: where it fires, ascending, and how strongly."""

    fires: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a rule says of held-out places."""

    which: np.ndarray
    """int8: the first term that holds, -1 where none does."""
    levels: np.ndarray
    """The activation that each term predicts."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """The predicted activation: 0 where the rule does not hold."""
        return np.append(self.levels, 0.0)[self.which[places]]


def rule_score(documents: Documents, held: Held, own: Prediction, null: Prediction | None) -> Score:
    """Balanced accuracy of "the rule holds" for "the feature fires", with precision and recall.

    `held` must fire somewhere, and not everywhere.
    """
    table = _table(documents, held, own)
    hits, firing, false, silent = table.sum(0)
    value, (low, high) = _balanced(table), _interval(table)
    predicted = hits + false
    return Score(
        name="rule", value=value, low=low, high=high, n=int(firing + silent),
        null=None if null is None else _balanced(_table(documents, held, null)),
        detail={
            "precision": float(hits / predicted) if predicted else 0.0,
            "recall": float(hits / firing),
            "specificity": float(1 - false / silent),
            "firing": int(firing),
            "predicted": int(predicted),
            "documents": int(np.count_nonzero(table[:, 1])),
        },
    )  # fmt: skip


def simulation_score(
    documents: Documents, held: Held, own: Prediction, null: Prediction | None
) -> Score:
    """Correlation of the activation with what the rule predicts, over every held-out place."""
    moments = _moments(documents, held, own)
    total = moments.sum(0)
    value = float(_correlation(total))
    freedom = _freedom(documents.sums(held.fires))
    half = _student(freedom) * _jackknife(_correlation(total - moments)) if freedom else 2.0
    return Score(
        name="simulation", value=value, low=max(-1.0, value - half), high=min(1.0, value + half),
        n=int(total[0]),
        null=None if null is None
        else float(_correlation(_moments(documents, held, null).sum(0))),
    )  # fmt: skip


def _table(documents: Documents, held: Held, rule: Prediction) -> np.ndarray:
    """Hits, firing, false alarms and silent places of each document, `[n_documents, 4]`."""
    firing = documents.sums(held.fires)
    hits = documents.sums(held.fires[rule.which[held.fires] >= 0])
    said = documents.sums(np.flatnonzero(rule.which >= 0))
    return np.stack([hits, firing, said - hits, documents.sizes - firing], 1)


def _balanced(table: np.ndarray) -> float:
    hits, firing, false, silent = table.sum(0)
    return float(0.5 * (hits / firing + 1 - false / silent))


def _interval(table: np.ndarray) -> tuple[float, float]:
    """95%, of documents drawn from many: each row is one's `hits, firing, false, silent`."""
    total = table.sum(0)
    hits, firing, false, silent = total
    without = total - table
    freedom = _freedom(table[:, 1])
    if not freedom or not without[:, 3].all():
        return 0.0, 1.0  # one document says nothing of others
    value, recall, alarm = _balanced(table), hits / firing, false / silent
    half = _student(freedom) * _jackknife(
        0.5 * (without[:, 0] / without[:, 1] + 1 - without[:, 2] / without[:, 3])
    )
    low, high = value - half, value + half
    (r_low, r_high), (a_low, a_high) = wilson(hits, firing), wilson(false, silent)
    low = min(low, value - 0.5 * np.hypot(recall - r_low, a_high - alarm))
    high = max(high, value + 0.5 * np.hypot(r_high - recall, alarm - a_low))
    return max(0.0, float(low)), min(1.0, float(high))


def wilson(hits: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` independent trials."""
    share, square = hits / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * np.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _freedom(firing: np.ndarray) -> float:
    """Documents in effect, less one: as many of equal weight would weigh like these. 0 of one."""
    return max(0.0, float(firing.sum() ** 2 / np.square(firing).sum()) - 1)


def _student(freedom: float) -> float:
    """Quantile 0.975 of Student's t."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(freedom, 0.975))


def _jackknife(without: np.ndarray) -> float:
    """Standard error of a figure, from what it is with each document left out in turn."""
    share = (len(without) - 1) / len(without)
    return float(np.sqrt(share * np.square(without - without.mean()).sum()))


def _moments(documents: Documents, held: Held, rule: Prediction) -> np.ndarray:
    """`n, x, y, xx, yy, xy` of each document; x is the activation, y what the rule predicts."""
    said = np.flatnonzero(rule.which >= 0)
    predicted, values = rule.at(said), held.values.astype(np.float64)
    return np.stack(
        [
            documents.sizes,
            documents.sums(held.fires, values),
            documents.sums(said, predicted),
            documents.sums(held.fires, values**2),
            documents.sums(said, predicted**2),
            documents.sums(held.fires, values * rule.at(held.fires)),
        ],
        1,
    )


def _correlation(moments: np.ndarray) -> np.ndarray:
    """Pearson's, of the last axis; 0 where one of the two does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_spread, y_spread = xx - x * x / n, yy - y * y / n
        found = (xy - x * y / n) / np.sqrt(x_spread * y_spread)
        tiny = (x_spread <= 1e-12 * xx) | (y_spread <= 1e-12 * yy) | (n <= 0)
    return np.where(tiny, 0.0, np.clip(found, -1, 1))
