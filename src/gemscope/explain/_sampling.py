"""Which windows a feature is explained from, and which its explanation is judged on."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemscope.features import Explanation

from ._firings import Firing, Firings, Sides
from ._windows import Cutter, Window, overlaps

LEAST = 4
"""Windows of each kind that a score needs."""
_BINS = 5
_TRIES = 400
_NEIGHBOURS = 5
_SAME_TOKENS = 8
"""So many of the tokens a feature fires on most are looked for where it is silent."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws the windows of features of one dictionary; the same ones for the same seed."""

    firings: Firings
    sides: Sides
    cutter: Cutter
    seed: int

    def explaining(self, feature: int, count: int) -> list[Window]:
        """Up to `count` windows, strongest first, marked: half the strongest, half spread over the
        quantiles of what it fires with.
        """
        firing = self.firings.of(feature)
        draw = _Draw(self.cutter, firing, self.sides.explaining(firing), self._rng(feature, 0))
        windows = draw.strongest(-(-count // 2))
        windows += draw.spread(count - len(windows))
        return [w.marked() for w in sorted(windows, key=lambda w: (-max(w.values), w.first))]

    def firing(self, explained: Explanation, count: int, purpose: int = 1) -> list[Window]:
        """Up to `count` windows of scoring documents in which it fires, spread over quantiles."""
        return self._scoring(explained, purpose).spread(count)

    def silent(
        self, explained: Explanation, count: int, beside: Sequence[Window] = ()
    ) -> list[Window]:
        """Up to `count` random windows of scoring documents in which it is silent, none of which
        overlaps one of `beside`.
        """
        draw = self._scoring(explained, 2, beside)
        return draw.take(draw.random_places(), count)

    def hard(self, explained: Explanation, count: int, beside: Sequence[Window] = ()) -> "Hard":
        """As `silent`, of those that resemble windows in which it fires.

        Half where a near feature fires, half with a token it fires on; where there are too few of
        one kind, more of the other, and places where it nearly fires.
        """
        draw = self._scoring(explained, 3, beside)
        near = self.firings.row(explained.feature)["neighbours"] or []
        found = Hard(draw.take(self._neighbouring(near, draw), -(-count // 2)))
        found.tokens += draw.take(self._same_tokens(draw), count - len(found.all))
        found.neighbours += draw.take(self._neighbouring(near, draw), count - len(found.all))
        misses = draw.shuffled(self.firings.near(explained.feature)).tolist()
        found.misses += draw.take(misses, count - len(found.all))
        return found

    def _scoring(
        self, explained: Explanation, purpose: int, beside: Sequence[Window] = ()
    ) -> "_Draw":
        firing = self.firings.of(explained.feature)
        learned_on = _learned_on(explained, len(self.cutter.text.paths))
        documents = ~self.sides.explaining(firing) if learned_on is None else ~learned_on
        # It may have been made with another seed: not from what it says it has seen.
        if seen := _shown(explained):
            paths = self.cutter.text.paths
            documents = documents & np.array([path not in seen for path in paths], dtype=bool)
        rng = self._rng(explained.feature, purpose)
        return _Draw(self.cutter, firing, documents, rng, [(w.first, w.stop) for w in beside])

    def _rng(self, feature: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, feature, purpose])

    def _neighbouring(self, near: list[dict[str, Any]], draw: "_Draw") -> Iterable[int]:
        """Places where the nearest features fire, a few of each in turn."""
        lists = []
        for neighbour in near[:_NEIGHBOURS]:
            other = self.firings.of(int(neighbour["feature"]))
            lists.append(draw.shuffled(other.places)[:_TRIES])
        for turn in range(max((len(places) for places in lists), default=0)):
            yield from (int(places[turn]) for places in lists if turn < len(places))

    def _same_tokens(self, draw: "_Draw") -> Iterable[int]:
        """Places of the tokens on which the feature fires most, in the documents that score."""
        places = draw.places[draw.values > 0]
        ids, counts = np.unique(self.cutter.text.ids[places], return_counts=True)
        often = ids[np.argsort(-counts, kind="stable")[:_SAME_TOKENS]]
        lists = [draw.shuffled(self.cutter.holding(int(token)))[:_TRIES] for token in often]
        for turn in range(max((len(found) for found in lists), default=0)):
            yield from (int(found[turn]) for found in lists if turn < len(found))


def _shown(explained: Explanation) -> set[str]:
    """Paths of the documents that a model was shown."""
    documents = explained.detail.get("documents")
    paths = documents.get("explaining") if isinstance(documents, Mapping) else None
    return {str(path) for path in paths} if isinstance(paths, list | tuple) else set()


def _learned_on(explained: Explanation, count: int) -> np.ndarray | None:
    """The documents that a rule was learned on, bool `[count]`; None of what is no rule."""
    training = explained.detail.get("training") if explained.method == "rule" else None
    said = training.get("documents") if isinstance(training, Mapping) else None
    if not isinstance(said, str) or not re.fullmatch(r"(\d{1,9}(-\d{1,9})?(,|$))*", said):
        return None
    out = np.zeros(count, dtype=bool)
    for run in said.split(","):
        first, _, last = run.partition("-")
        out[int(first or 0) : int(last or first or -1) + 1] = True
    return out


@dataclass(slots=True)
class Hard:
    """Windows that are easily taken for ones in which a feature fires."""

    neighbours: list[Window]
    tokens: list[Window] = field(default_factory=list)
    misses: list[Window] = field(default_factory=list)

    @property
    def all(self) -> list[Window]:
        """All kinds."""
        return self.neighbours + self.tokens + self.misses

    @property
    def kinds(self) -> dict[str, int]:
        """How many there are of each."""
        counts = {"a neighbour fires": len(self.neighbours), "same token": len(self.tokens)}
        return counts | {"it nearly fires": len(self.misses)}


@dataclass(slots=True)
class _Draw:
    """Windows of one feature from some of the documents, none overlapping another."""

    cutter: Cutter
    firing: Firing
    documents: np.ndarray
    rng: np.random.Generator
    taken: list[tuple[int, int]] = field(default_factory=list)

    @property
    def places(self) -> np.ndarray:
        return self.firing.places[self._allowed(self.firing.places)]

    @property
    def values(self) -> np.ndarray:
        return self.firing.values[self._allowed(self.firing.places)]

    def _allowed(self, places: np.ndarray) -> np.ndarray:
        return self.documents[self.cutter.text.document_of(places)]

    def shuffled(self, places: np.ndarray) -> np.ndarray:
        """Those of `places` that may be used, in random order."""
        return self.rng.permutation(places[self._allowed(places)])

    def _windows(self, places: Iterable[int], count: int, *, silent: bool) -> list[Window]:
        found: list[Window] = []
        for place in places:
            if len(found) >= count:
                break
            span = self.cutter.span(place)
            if silent and not self.firing.silent(*span):
                continue
            if not overlaps(span, self.taken):
                self.taken.append(span)
                found.append(self.cutter.window(place, self.firing.places, self.firing.values))
        return found

    def strongest(self, count: int) -> list[Window]:
        """The windows of the strongest activations."""
        places, values = self.places, self.values
        order = np.argsort(-values, kind="stable")[:_TRIES]
        return self._windows(places[order].tolist(), count, silent=False)

    def spread(self, count: int) -> list[Window]:
        """Windows of activations from each fifth of them by strength, new documents first."""
        places, values = self.places, self.values
        order = np.argsort(values, kind="stable")
        found: list[Window] = []
        for number, part in enumerate(reversed(np.array_split(order, _BINS))):
            # A fifth that has too little leaves its share to the next.
            wanted = -(-count * (number + 1) // _BINS) - len(found)
            drawn = self.rng.permutation(part)[:_TRIES]
            documents = self.cutter.text.document_of(places[drawn])
            seen = np.isin(documents, [w.document for w in found])
            _, once = np.unique(documents, return_index=True)
            seen |= ~np.isin(np.arange(len(drawn)), once)
            fresh_first = drawn[np.argsort(seen, kind="stable")]
            found += self._windows(places[fresh_first].tolist(), wanted, silent=False)
        return found

    def random_places(self) -> Iterable[int]:
        """Random counted tokens of which it is known whether the feature fires on them."""
        text, known = self.cutter.text, self.firing.known
        ends = np.cumsum(known[:, 1] - known[:, 0])
        if not len(ends):
            return
        for _ in range(20):
            drawn = np.sort(self.rng.integers(0, ends[-1], _TRIES))
            row = np.searchsorted(ends, drawn, side="right")
            places = known[row, 1] - (ends[row] - drawn)
            yield from self.shuffled(places[text.counts[places]]).tolist()

    def take(self, places: Iterable[int], count: int) -> list[Window]:
        """Up to `count` windows around `places` in which the feature is silent."""
        return self._windows(places, count, silent=True)
