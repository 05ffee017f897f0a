"""Finding a short rule for where a feature fires.

Everything is counted: at the places where the feature fires, each answer of each channel is
counted in one go, and the counts over the whole text are known. What a set of answers is worth
follows from the counts, since balanced accuracy is linear in what is included; so the best set of
each channel is its answers sorted by worth, up to where the next does not pay for being read. From
the best sets a small beam builds conjunctions, counting again among the places where the first
part holds (a fixed sample of them where there are many), and terms are added for what is not yet
covered. The search looks at a sample of the silent places; what it finds is measured on every
training place.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._conditions import CHANNELS, TOKENS, Conditions
from ._rules import Condition, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """How rules are sought. Costs are in units of balanced accuracy."""

    least: int = 5
    """Firing training places that a rule needs, and places that an answer must have."""
    terms: int = 4
    """Joined by "or"."""
    conditions: int = 3
    """Joined by "and" in a term."""
    values: int = 10
    """Answers that a condition may list; of what is excluded, three."""
    condition_cost: float = 0.01
    value_cost: float = 0.002
    precision: float = 0.2
    """Weight of F1 beside balanced accuracy, which by itself is blind to the precision of a rare
    feature's rule."""
    beam: tuple[int, ...] = (4, 2)
    """Parts that are tried further after one condition, after two."""
    pool: int = 20_000
    """Silent places at most that the search looks at; what it finds is measured on all."""
    sample: int = 1_500
    """Of those, places at most among which is counted at a time."""
    held_out: float = 0.4
    """Share of the tokens, in documents of their own, that rules are scored on."""
    tokens: int = 400_000
    """Tokens at most, for learning and scoring together; whole documents."""
    seed: int = 0
    """Of which documents are held out."""


_EXCLUDED = 3
_KEPT = 4
"""Channels of one part that are looked at further."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A rule, and which of its terms holds first at each training place: int8, -1 where none."""

    rule: Rule
    which: np.ndarray


@dataclass(frozen=True, slots=True)
class _Part:
    """Some conditions that hold together, each `(channel, answers, negated)`, and their worth."""

    worth: float
    hits: float
    """Firing places that it adds, as far as they are counted."""
    conditions: tuple[tuple[int, tuple[int, ...], bool], ...]


class _State:
    """A feature, and a rule in the making with what it does not cover yet."""

    def __init__(self, learner: "Learner", fires: np.ndarray):
        settings = learner.settings
        size = len(learner.places)
        self.fires = np.zeros(size, dtype=bool)
        self.fires[fires] = True
        self.firing, self.silent = len(fires), size - len(fires)
        some = fires[:: -(-len(fires) // (2 * settings.sample))]
        self.own = learner.rows[:, some]
        self.own_table = learner.table[some].astype(np.int64)
        """Answers where it fires, `[n_channels, n]`, and how many places each stands for."""
        self.own_weight = len(fires) / len(some)
        self.own_open = np.ones(len(some), dtype=bool)
        self.pool_open = ~self.fires[learner.pool_places]
        self.pool_weight = self.silent / max(int(self.pool_open.sum()), 1)
        self.which = np.full(size, -1, dtype=np.int8)
        self.hits = self.false = 0
        self.cost, self.worth = 0.0, 0.5


class Learner:
    """The answers at the training places, counted; it learns one feature at a time."""

    def __init__(self, conditions: Conditions, places: np.ndarray, settings: RuleSettings):
        self.conditions, self.places, self.settings = conditions, places, settings
        rows, owners, answers, first = [], [], [], [0]
        for channel, codes in enumerate(conditions.codes):
            here = codes[places]
            counts = np.bincount(here, minlength=len(conditions.values[channel]))
            kept = np.flatnonzero(counts >= settings.least)[: 2**15 - 1]
            # Whatever is rarer is one answer, the first, that no rule may name.
            table = np.zeros(len(counts), dtype=np.int16)
            table[kept] = 1 + np.arange(len(kept))
            rows.append(table[here])
            owners += [channel] * (1 + len(kept))
            answers += [-1, *kept.tolist()]
            first.append(len(owners))
        self.rows = np.stack(rows)
        """int16 `[n_channels, n]`: the answer, counted in its channel."""
        self.owner = np.array(owners)
        self.answer = np.array(answers)
        self.first = np.array(first)
        """Of each channel, the first answer counted through all channels; and their number."""
        step = -(-len(places) // settings.pool)
        self.pool_places = np.arange(0, len(places), max(step, 1))
        self.pool = np.ascontiguousarray(self.rows[:, self.pool_places])
        self.table = np.ascontiguousarray((self.rows + self.first[:-1, None]).T.astype(np.int32))
        """int32 `[n, n_channels]`: the answer, counted through all channels."""
        # Of the type that numpy counts: it would be converted every time.
        self.pool_table = self.table[self.pool_places].astype(np.int64)

    def learn(self, fires: np.ndarray) -> Learned | None:
        """The rule of a feature that fires at `fires`, ascending indices into the training places.

        None where it fires too rarely, or nothing is better than no rule.
        """
        if not self.settings.least <= len(fires) < len(self.places):
            return None
        state = _State(self, fires)
        terms: list[_Part] = []
        while len(terms) < self.settings.terms:
            term = self._term(state)
            if term is None:
                break
            terms.append(term)
        if not terms:
            return None
        return Learned(Rule(tuple(self._told(term) for term in terms)), state.which)

    def _told(self, part: _Part) -> tuple[Condition, ...]:
        told = []
        for channel, answers, negated in part.conditions:
            values = tuple(self.conditions.values[channel][int(self.answer[a])] for a in answers)
            name = CHANNELS[channel]
            ids = values if name in TOKENS else ()
            texts = tuple(self.conditions.shown.get(int(i), "") for i in ids)
            told.append(Condition(name, values, negated, texts))
        return tuple(told)

    def _term(self, state: _State) -> _Part | None:
        """The best term to add, which `state` then has; None if none pays."""
        settings = self.settings
        found = self._extend(state, _Part(0.0, float(state.firing), ()))
        best, pool = found[:2], found[: settings.beam[0]]
        for depth in range(1, settings.conditions):
            # A condition more can only take away, at best all that is false.
            pool = [part for part in pool if self._bound(state, part) > best[0].worth]
            found = [more for part in pool for more in self._extend(state, part)]
            found = _different(sorted(found, key=lambda part: -part.worth))
            best = sorted([*best, *found[:3]], key=lambda part: -part.worth)[:4]
            pool = found[: settings.beam[min(depth, len(settings.beam) - 1)]]
        return self._take(state, best)

    def _bound(self, state: _State, part: _Part) -> float:
        cost = self._cost(part) + self.settings.condition_cost
        return float(self._worth(state, part.hits, 0, cost))

    def _take(self, state: _State, parts: list[_Part]) -> _Part | None:
        """The best of `parts` when measured at every place, if it is better than the state."""
        chosen: tuple[float, _Part, np.ndarray, int, int] | None = None
        for part in parts:
            holds = (state.which < 0) & self._holds(part, self.rows)
            hits = int(np.count_nonzero(holds & state.fires))
            false = int(np.count_nonzero(holds)) - hits
            worth = float(self._worth(state, hits, false, self._cost(part)))
            if hits and (chosen is None or worth > chosen[0]):
                chosen = (worth, part, holds, hits, false)
        if chosen is None or chosen[0] <= state.worth:
            return None
        state.worth, part, holds, hits, false = chosen
        state.which[holds] = state.which.max() + 1
        state.own_open &= ~self._holds(part, state.own)
        state.pool_open &= ~holds[self.pool_places]
        state.hits += hits
        state.false += false
        state.cost += self._cost(part)
        return part

    def _cost(self, part: _Part) -> float:
        values = sum(len(answers) - 1 for _, answers, _ in part.conditions)
        settings = self.settings
        return settings.condition_cost * len(part.conditions) + settings.value_cost * values

    def _worth(self, state: _State, hits: Any, false: Any, cost: Any) -> Any:
        """What the rule is worth with a term more; arrays or numbers."""
        hits, false = state.hits + hits, state.false + false
        balanced = 0.5 * (hits / state.firing + 1 - false / state.silent)
        f1 = 2 * hits / (hits + false + state.firing)
        return balanced + self.settings.precision * f1 - state.cost - cost

    def _holds(self, part: _Part, rows: np.ndarray) -> np.ndarray:
        """Where `part` holds, bool, of answers as in `rows`."""
        holds = np.ones(rows.shape[1], dtype=bool)
        for channel, answers, negated in part.conditions:
            own = [a - int(self.first[channel]) for a in answers]
            found = rows[channel] == own[0]
            for answer in own[1:]:
                found |= rows[channel] == answer
            holds &= ~found if negated else found
        return holds

    def _extend(self, state: _State, part: _Part) -> list[_Part]:
        """`part` with each channel's best set more, best first."""
        own, pool = state.own_open, state.pool_open
        if part.conditions:
            own, pool = own & self._holds(part, state.own), pool & self._holds(part, self.pool)
        hits, hit_weight, firing = self._counted(state.own_table, own, state.own_weight)
        false, false_weight, silent = self._counted(self.pool_table, pool, state.pool_weight)
        if not firing:
            return []
        for counts in (hits, false):
            counts[self.first[:-1]] = 0  # the answers that no rule may name
            for channel, _, _ in part.conditions:
                counts[self.first[channel] : self.first[channel + 1]] = 0
        # What speaks for an answer is taken a standard error lower: chance finds are not told.
        named = np.flatnonzero(hits)
        own, other = hits[named] * hit_weight, false[named] * false_weight
        gain = (own - np.sqrt(own)) / state.firing - other / state.silent
        found = self._sets(state, part, named, gain, (own, other), None)
        least = 2 * self.settings.value_cost * state.silent / false_weight
        named = np.flatnonzero(false > least)
        own, other = hits[named] * hit_weight, false[named] * false_weight
        gain = (other - np.sqrt(other)) / state.silent - own / state.firing
        found += self._sets(state, part, named, gain, (own, other), (firing, silent))
        return sorted(found, key=lambda one: -one.worth)

    def _counted(
        self, table: np.ndarray, where: np.ndarray, weight: float
    ) -> tuple[np.ndarray, float, float]:
        """Answers counted among the rows of `table`, how many places a count stands for, and
        places in all.
        """
        indices = np.flatnonzero(where)
        total = len(indices)
        indices = indices[:: max(-(-total // self.settings.sample), 1)]
        counts = np.bincount(table[indices].ravel(), minlength=len(self.owner))
        return counts, weight * total / max(len(indices), 1), weight * total

    def _sets(
        self, state: _State, part: _Part, named: np.ndarray, gain: np.ndarray,
        counts: tuple[np.ndarray, np.ndarray], without: tuple[float, float] | None,
    ) -> list[_Part]:  # fmt: skip
        """The best channels' best sets of the answers `named`, which have `counts` firing and
        silent places; of answers to exclude, if the counts to take them from are given.
        """
        paying = np.flatnonzero(gain > 2 * self.settings.value_cost)
        if not len(paying):
            return []
        paying = paying[np.lexsort((-gain[paying], self.owner[named[paying]]))]
        index = named[paying]
        owner = self.owner[index]
        begins = np.flatnonzero(np.concatenate(([True], owner[1:] != owner[:-1])))
        lengths = np.diff(np.append(begins, len(index)))
        rank = np.arange(len(index)) - np.repeat(begins, lengths)
        sums = []
        for found in (counts[0][paying], counts[1][paying]):
            running = np.cumsum(found)
            sums.append(running - np.repeat(running[begins] - found[begins], lengths))
        if without is not None:
            sums = [np.maximum(without[i] - sums[i], 0.0) for i in (0, 1)]
        cost = self._cost(part) + self.settings.condition_cost + self.settings.value_cost * rank
        most = self.settings.values if without is None else _EXCLUDED
        worth = np.where(rank < most, self._worth(state, sums[0], sums[1], cost), -1.0)
        highest = np.maximum.reduceat(worth, begins)
        parts = []
        for group in np.argsort(-highest, kind="stable")[:_KEPT].tolist():
            begin = int(begins[group])
            best = begin + int(np.argmax(worth[begin : begin + int(lengths[group])]))
            answers = tuple(index[begin : best + 1].tolist())
            added = (int(owner[begin]), answers, without is not None)
            conditions = (*part.conditions, added)
            parts.append(_Part(float(worth[best]), float(sums[0][best]), conditions))
        return parts


def _different(parts: list[_Part]) -> list[_Part]:
    """One of those that say the same in another order."""
    seen, out = set(), []
    for part in parts:
        key = frozenset(part.conditions)
        if key not in seen:
            seen.add(key)
            out.append(part)
    return out
