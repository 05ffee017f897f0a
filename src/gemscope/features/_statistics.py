"""Everything measured of some features, from their activations: exact, a block of features at once.

Activations of a feature come with places ascending, so contexts and documents are runs of entries
and nearly everything is a count over runs; only quantiles need a sort.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._activations import Entries
from ._contexts import Peaks, choose_contexts, listed
from ._text import Text

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Shares of the activations of a feature under its quantiles."""
BINS_PER_OCTAVE = 4
"""Of the histogram of activations: bin `b` holds `2 ** (b / 4)` to `2 ** ((b + 1) / 4)`."""
INTERVALS = 5
"""Of activations, each with an equal share of them where values differ."""
_COUNTABLE = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many of each kind are kept of a feature."""

    top: int = 20
    samples: int = 5
    """Of each interval."""
    near: int = 5
    tokens: int = 10
    """Tokens it fires on, before and after, and promoted and suppressed ones."""
    together: int = 16
    neighbours: int = 10


@dataclass(frozen=True, slots=True)
class Block:
    """The measured columns of some features, a list of `n_features` each, and their contexts."""

    columns: dict[str, list]
    contexts: dict[str, Any]


class Measurer:
    """Measures blocks of features on one text."""

    def __init__(self, text: Text, vocabulary: Sequence[str], *, keep: Keep, seed: int = 0):
        self.text, self.vocabulary, self.keep, self.seed = text, vocabulary, keep, seed
        places = np.flatnonzero(text.counts)
        _, begins = np.unique(text.context[places], return_index=True)
        self._first = np.zeros(len(text.ids), dtype=bool)
        self._first[places[begins]] = True
        self._source = text.source[text.document][text.context]
        self._bins = int(np.log2(max(1, int(text.position.max())))) + 1

    def block(self, entries: Entries, near: Entries) -> Block:
        """Everything of the features in `entries`; `near` are their near misses."""
        feature, places, values = entries.features, entries.places, entries.values
        counts, n = np.diff(entries.offsets), len(entries.offsets) - 1
        ordered = _sorted(feature, values)
        quantiles = _quantiles(ordered, entries.offsets, [*QUANTILES, 0.2, 0.4, 0.6, 0.8])
        sums = np.bincount(feature, weights=values.astype(np.float64), minlength=n)
        intervals = _intervals(feature, values, quantiles[:, len(QUANTILES) :])
        peaks = Peaks.of(entries, self.text)
        text = self.text
        columns: dict[str, list] = {
            "count": counts.tolist(),
            "density": (counts / text.n_tokens).tolist(),
            "mean": (sums / text.n_tokens).tolist(),
            "mean_active": (sums / np.maximum(counts, 1)).tolist(),
            "max": _last(ordered, entries.offsets).tolist(),
            "quantiles": [
                q[: len(QUANTILES)].tolist() if c else []
                for q, c in zip(quantiles, counts, strict=True)
            ],
            "histogram": _histograms(feature, values, n),
            "positions": self._positions(feature, places, n),
            "first_share": (
                np.bincount(feature[self._first[places]], minlength=n) / np.maximum(counts, 1)
            ).tolist(),
            "documents": peaks.documents(n).tolist(),
            "source_densities": self._source_densities(feature, places, n),
            "intervals": _interval_rows(feature, values, intervals, quantiles, ordered, entries),
        }
        columns |= self._tokens(feature, places, counts, n)
        chosen = choose_contexts(
            entries, near, peaks, intervals, text, keep=self.keep, seed=self.seed
        )
        return Block(columns, chosen | listed(entries, chosen, text))

    def _positions(self, feature: np.ndarray, places: np.ndarray, n: int) -> list[list[int]]:
        bins = np.log2(np.maximum(self.text.position[places], 1)).astype(np.int64)
        table = np.bincount(feature * self._bins + bins, minlength=n * self._bins)
        return table.reshape(n, self._bins).tolist()

    def _source_densities(self, feature: np.ndarray, places: np.ndarray, n: int) -> list:
        size = len(self.text.sources)
        table = np.bincount(feature * size + self._source[places], minlength=n * size)
        return (table.reshape(n, size) / np.maximum(self.text.tokens_of_sources, 1)).tolist()

    def _tokens(
        self, feature: np.ndarray, places: np.ndarray, counts: np.ndarray, n: int
    ) -> dict[str, list]:
        """The tokens a feature fires on, those before and those after."""
        ids, context = self.text.ids, self.text.context
        last = len(ids) - 1
        before, after = np.maximum(places - 1, 0), np.minimum(places + 1, last)
        here = {
            "tokens": (feature, places),
            "before": _where(feature, before, context[before] == context[places], places > 0),
            "after": _where(feature, after, context[after] == context[places], places < last),
        }
        size = len(self.vocabulary)
        return {
            name: self._common(f, ids[p].astype(np.int64), counts, n, size)
            for name, (f, p) in here.items()
        }

    def _common(
        self, feature: np.ndarray, ids: np.ndarray, counts: np.ndarray, n: int, size: int
    ) -> list[list[dict]]:
        keys = feature * size + ids
        if n * size <= _COUNTABLE:
            table = np.bincount(keys, minlength=n * size)
            found = np.flatnonzero(table)
            times = table[found]
        else:
            found, times = np.unique(keys, return_counts=True)
        owner, token = found // size, found % size
        order = np.lexsort((token, -times, owner))
        owner, token, times = owner[order], token[order], times[order]
        kept = np.arange(len(owner)) - np.searchsorted(owner, owner) < self.keep.tokens
        out: list[list[dict]] = [[] for _ in range(n)]
        for f, t, c in zip(
            owner[kept].tolist(), token[kept].tolist(), times[kept].tolist(), strict=True
        ):
            out[f].append(
                {"token": self.vocabulary[t], "id": t, "count": c, "share": c / int(counts[f])}
            )
        return out


def _where(
    feature: np.ndarray, places: np.ndarray, *masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    keep = np.logical_and.reduce(masks)
    return feature[keep], places[keep]


def _sorted(feature: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in ascending order within each feature; bits of positive floats sort as they do."""
    keys = feature.astype(np.uint64) << np.uint64(32) | values.view(np.uint32)
    keys.sort()
    return keys.astype(np.uint32).view(np.float32)


def _quantiles(ordered: np.ndarray, offsets: np.ndarray, shares: list[float]) -> np.ndarray:
    """Quantiles `[n_features, n_shares]` with linear interpolation; NaN where nothing fires."""
    counts = np.diff(offsets)
    out = np.full((len(counts), len(shares)), np.nan)
    alive = counts > 0
    place = (counts[alive, None] - 1) * np.array(shares)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, counts[alive, None] - 1)
    begin = offsets[:-1][alive, None]
    a, b = (ordered[begin + i].astype(np.float64) for i in (low, high))
    out[alive] = a + (b - a) * (place - low)
    return out


def _last(ordered: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = np.zeros(len(offsets) - 1, dtype=np.float32)
    alive = np.diff(offsets) > 0
    out[alive] = ordered[offsets[1:][alive] - 1]
    return out


def _histograms(feature: np.ndarray, values: np.ndarray, n: int) -> list[dict]:
    if not len(values):
        return [{"first": 0, "counts": []} for _ in range(n)]
    bins = np.floor(np.log2(values.astype(np.float64)) * BINS_PER_OCTAVE).astype(np.int64)
    low, size = int(bins.min()), int(bins.max() - bins.min()) + 1
    table = np.bincount(feature * size + (bins - low), minlength=n * size).reshape(n, size)
    out = []
    for row in table:
        filled = np.flatnonzero(row)
        if not len(filled):
            out.append({"first": 0, "counts": []})
            continue
        first, last = int(filled[0]), int(filled[-1])
        out.append({"first": low + first, "counts": row[first : last + 1].tolist()})
    return out


def _intervals(feature: np.ndarray, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The interval of each activation, from 0, by its feature's fifths."""
    out = np.zeros(len(values), dtype=np.int64)
    for column in bounds.T:
        out += values > column[feature]
    return out


def _interval_rows(
    feature: np.ndarray,
    values: np.ndarray,
    intervals: np.ndarray,
    quantiles: np.ndarray,
    ordered: np.ndarray,
    entries: Entries,
) -> list[list[dict]]:
    """Of each feature's intervals the borders, the share of firings and of summed activation."""
    n = len(entries.offsets) - 1
    key = feature * INTERVALS + intervals
    counts = np.bincount(key, minlength=n * INTERVALS).reshape(n, INTERVALS)
    sums = np.bincount(key, weights=values.astype(np.float64), minlength=n * INTERVALS)
    sums = sums.reshape(n, INTERVALS)
    out: list[list[dict]] = []
    for f, begin in enumerate(entries.offsets[:-1]):
        total = int(counts[f].sum())
        if not total:
            out.append([])
            continue
        edges = [float(ordered[begin]), *quantiles[f, len(QUANTILES) :].tolist()]
        edges.append(float(ordered[begin + total - 1]))
        out.append(
            [
                {
                    "low": edges[i], "high": edges[i + 1],
                    "share": int(counts[f, i]) / total, "mass": float(sums[f, i] / sums[f].sum()),
                }
                for i in range(INTERVALS)
            ]
        )  # fmt: skip
    return out
