"""Which contexts of a feature are kept: its top ones, samples of intervals, near misses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._activations import Entries
from ._text import Text

if TYPE_CHECKING:
    from ._statistics import Keep

GROUPS = ("top", *(f"interval {i}" for i in range(1, 6)), "near")
"""Kinds of contexts: the strongest, samples of each fifth of the activations, near misses."""
_WINDOW = 12
"""Tokens up to a peak that make two contexts the same."""
_POOL = 200
"""Activations that samples are drawn from, about, of each interval."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The strongest activation of each feature in each context in which it fires."""

    feature: np.ndarray
    context: np.ndarray
    document: np.ndarray
    place: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, entries: Entries, text: Text) -> "Peaks":
        """By feature, then by context; of equal activations the first."""
        feature, context = entries.features, text.context[entries.places].astype(np.int64)
        if not len(feature):
            empty = np.zeros(0, dtype=np.int64)
            return cls(empty, empty, empty, empty, np.zeros(0, dtype=np.float32))
        begins = np.flatnonzero(_changes(feature, context))
        peak = np.maximum.reduceat(entries.values, begins)
        lengths = np.diff(np.append(begins, len(feature)))
        group = np.repeat(np.arange(len(begins)), lengths)
        at = np.flatnonzero(entries.values == peak[group])
        _, first = np.unique(group[at], return_index=True)
        at = at[first]
        return cls(
            feature[at], context[at], text.document[context[at]].astype(np.int64),
            entries.places[at], entries.values[at],
        )  # fmt: skip

    def documents(self, n: int) -> np.ndarray:
        """Number of documents in which each of `n` features fires."""
        if not len(self.feature):
            return np.zeros(n, dtype=np.int64)
        return np.bincount(self.feature[_changes(self.feature, self.document)], minlength=n)


def choose_contexts(
    entries: Entries,
    near: Entries,
    peaks: Peaks,
    intervals: np.ndarray,
    text: Text,
    *,
    keep: "Keep",
    seed: int,
) -> dict[str, np.ndarray]:
    """The chosen contexts as columns `feature`, `group`, `rank`, `place`, `value`."""
    parts = [_top(peaks, text, keep.top)]
    parts += _samples(entries, intervals, text, keep.samples, seed)
    parts.append(_near(near, text, keep.near))
    groups = np.repeat(np.arange(len(parts)), [len(p[0]) for p in parts])
    feature, rank, place, value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((rank, groups, feature))
    return {
        "feature": feature[order], "group": groups[order], "rank": rank[order],
        "place": place[order], "value": value[order],
    }  # fmt: skip


def listed(entries: Entries, chosen: dict[str, np.ndarray], text: Text) -> dict[str, Any]:
    """Of each chosen context where it is, and every activation of the feature in it."""
    size = len(text.ids)
    context = text.context[chosen["place"]].astype(np.int64)
    keys = entries.features * size + entries.places
    low = np.searchsorted(keys, chosen["feature"] * size + text.offsets[context])
    high = np.searchsorted(keys, chosen["feature"] * size + text.offsets[context + 1])
    lengths = high - low
    ends = np.concatenate(([0], np.cumsum(lengths)))
    at = np.repeat(low - ends[:-1], lengths) + np.arange(int(ends[-1]))
    return {
        "context": context,
        "position": text.position[chosen["place"]],
        "ends": ends,
        "positions": text.position[entries.places[at]],
        "values": entries.values[at],
    }


def _changes(*keys: np.ndarray) -> np.ndarray:
    """True where any of the sorted `keys` differs from the entry before."""
    out = np.zeros(len(keys[0]), dtype=bool)
    out[:1] = True
    for key in keys:
        out[1:] |= key[1:] != key[:-1]
    return out


def _ranked(feature: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of entries, sorted by feature, are its first `limit`, and the rank of those."""
    rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
    return rank < limit, rank[rank < limit]


def _strongest(
    feature: np.ndarray, document: np.ndarray, place: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Entries, one of a feature and document, by feature and falling value."""
    order = np.lexsort((place, -value, document, feature))
    order = order[_changes(feature[order], document[order])]
    return order[np.lexsort((place[order], -value[order], feature[order]))]


def _top(peaks: Peaks, text: Text, limit: int) -> tuple[np.ndarray, ...]:
    order = _strongest(peaks.feature, peaks.document, peaks.place, peaks.value)
    feature, place = peaks.feature[order], peaks.place[order]
    # The same words in two documents, a licence perhaps, are one context.
    same = np.stack([feature.astype(np.uint64), _windows(place, text)])
    _, first = np.unique(same, axis=1, return_index=True)
    first.sort()
    order, feature = order[first], feature[first]
    kept, rank = _ranked(feature, limit)
    order = order[kept]
    return peaks.feature[order], rank, peaks.place[order], peaks.value[order]


def _windows(place: np.ndarray, text: Text) -> np.ndarray:
    """A hash of the tokens up to each place, in its context."""
    out = np.zeros(len(place), dtype=np.uint64)
    begins = text.offsets[text.context[place]]
    for back in range(_WINDOW):
        at = place - back
        token = np.where(at > begins, text.ids[np.maximum(at, 0)], -1).astype(np.int64)
        out = (out ^ token.astype(np.uint64)) * np.uint64(0x100000001B3)
    return out


def _samples(
    entries: Entries, intervals: np.ndarray, text: Text, limit: int, seed: int
) -> list[tuple[np.ndarray, ...]]:
    """Of every interval some activations, drawn by a hash of feature and place."""
    feature = entries.features
    counts = np.diff(entries.offsets)
    drawn = _uniform(feature, entries.places, seed)
    pool = np.flatnonzero(drawn * counts[feature] <= _POOL * 5)
    feature, places = feature[pool], entries.places[pool]
    document = text.document[text.context[places]].astype(np.int64)
    out: list[tuple[np.ndarray, ...]] = []
    for interval in range(5):
        mine = np.flatnonzero(intervals[pool] == interval)
        order = mine[_strongest(feature[mine], document[mine], places[mine], -drawn[pool[mine]])]
        kept, rank = _ranked(feature[order], limit)
        at = pool[order[kept]]
        out.append((feature[order[kept]], rank, entries.places[at], entries.values[at]))
    return out


def _uniform(feature: np.ndarray, place: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each pair, by splitmix64: the same everywhere and in any order."""
    z = (feature.astype(np.uint64) << np.uint64(40)) + place.astype(np.uint64)
    z = z + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def _near(near: Entries, text: Text, limit: int) -> tuple[np.ndarray, ...]:
    feature = near.features
    document = text.document[text.context[near.places]].astype(np.int64)
    order = _strongest(feature, document, near.places, near.values)
    kept, rank = _ranked(feature[order], limit)
    order = order[kept]
    return feature[order], rank, near.places[order], near.values[order]
