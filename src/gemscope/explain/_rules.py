"""A rule: what it says, where it holds, and how it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemscope.errors import InputError

from ._conditions import CHANNELS, NUMBERED, TOKENS, Conditions, Value
from ._rules_text import term_text

VERSION = 1
"""Of the stored form and of what the channels mean."""
_MOST = 64
"""Terms, conditions of a term and values of a condition that a stored rule may have."""


@dataclass(frozen=True, slots=True)
class Condition:
    """The answer of a channel is one of some values, or none of them."""

    channel: str
    values: tuple[Value, ...]
    negated: bool = False
    shown: tuple[str, ...] = ()
    """Of a channel of token ids, the text of each."""

    def holds(self, conditions: Conditions, places: np.ndarray | None = None) -> np.ndarray:
        """Bool at every place, or at `places`."""
        found = conditions.among(self.channel, self.values, places)
        return ~found if self.negated else found

    def json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        out: dict[str, Any] = {"channel": self.channel, "values": list(self.values)}
        return out | ({"not": True} if self.negated else {}) | (
            {"shown": list(self.shown)} if self.shown else {}
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """Holds at a place where all conditions of one of its terms hold."""

    terms: tuple[tuple[Condition, ...], ...]

    @property
    def text(self) -> str:
        """The rule in words: tokens in backquotes, `·` for a space, `⏎` for a line break."""
        return "; or ".join(
            term_text([(c.channel, c.shown or c.values, c.negated) for c in term])
            for term in self.terms
        )

    def holds(self, conditions: Conditions, places: np.ndarray | None = None) -> np.ndarray:
        """Bool at every place of the text, or at `places`."""
        return self.which(conditions, places) >= 0

    def which(self, conditions: Conditions, places: np.ndarray | None = None) -> np.ndarray:
        """The first term that holds, int8, at every place or at `places`; -1 where none does."""
        size = conditions.n_places if places is None else len(places)
        out = np.full(size, -1, dtype=np.int8)
        for number in reversed(range(len(self.terms))):
            holds = np.ones(size, dtype=bool)
            for condition in self.terms[number]:
                holds &= condition.holds(conditions, places)
            out[holds] = number
        return out

    def json(self) -> dict[str, Any]:
        """As JSON can hold it; `from_json` reads it."""
        return {"version": VERSION, "terms": [[c.json() for c in term] for term in self.terms]}

    @classmethod
    def from_json(cls, stored: object) -> "Rule":
        """A rule that `json` gave, perhaps through a file that others wrote."""
        if not isinstance(stored, Mapping) or stored.get("version") != VERSION:
            raise InputError(f"not a rule of version {VERSION}; learn it again with this gemscope")
        terms = _some(stored.get("terms"), "terms")
        return cls(tuple(tuple(_condition(c) for c in _some(t, "conditions")) for t in terms))


def _condition(stored: object) -> Condition:
    if not isinstance(stored, Mapping) or stored.get("channel") not in CHANNELS:
        name = stored.get("channel") if isinstance(stored, Mapping) else stored
        raise InputError(f"a rule has a condition of no known channel: {str(name)[:40]!r}")
    channel, values = str(stored["channel"]), _some(stored.get("values"), "values")
    shown = stored.get("shown", [])
    right = all(_fits(channel, v) for v in values)
    wanted = len(values) if channel in TOKENS else 0
    if not right or not isinstance(shown, list) or len(shown) != wanted:
        raise InputError(f"a rule has values that its channel {channel!r} cannot have")
    return Condition(channel, tuple(values), stored.get("not") is True, tuple(map(str, shown)))


def _fits(channel: str, value: object) -> bool:
    if channel not in NUMBERED:
        return isinstance(value, str)
    number = isinstance(value, int) and not isinstance(value, bool)
    # Bins are few: a large one is no bin, and its bounds would be numbers without end.
    return number and -1 <= int(str(value)) < (2**31 if channel in TOKENS else 64)


def _some(stored: object, what: str) -> list[Any]:
    if not isinstance(stored, list) or not 0 < len(stored) <= _MOST:
        raise InputError(f"a rule has 1 to {_MOST} {what} in a list")
    return stored
