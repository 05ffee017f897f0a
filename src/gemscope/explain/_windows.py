"""Windows: the stretches of text that a model is shown and asked about."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from gemscope.features import Text, shown, token_pieces

_BEFORE = 2 / 3
"""Share of a window that is before the token it is about: a model reads from the left."""
MARKED = 0.3
"""Tokens over this share of a window's maximum are marked."""


@dataclass(frozen=True, slots=True)
class Window:
    """Some tokens of one context, and where one feature fires among them."""

    document: int
    first: int
    """Place of its first token in the text."""
    pieces: tuple[str, ...]
    values: tuple[float, ...]
    """Activation at each token, 0 where the feature is silent."""
    marks: tuple[bool, ...] = ()
    """Tokens to set off; none for a window that is shown as plain text."""

    @property
    def stop(self) -> int:
        """The place behind its last token."""
        return self.first + len(self.pieces)

    @property
    def places(self) -> np.ndarray:
        """Places of its tokens in the text, int64."""
        return np.arange(self.first, self.stop)

    def marked(self) -> "Window":
        """With the tokens marked on which the feature fires."""
        bar = MARKED * max(self.values, default=0.0)
        return replace(self, marks=tuple(v > bar for v in self.values))

    def mismarked(self, rng: np.random.Generator) -> "Window | None":
        """With as many marks, at random tokens among those that `marked` leaves unmarked; None
        where there are too few of them.
        """
        right = self.marked().marks
        free = [i for i, (on, piece) in enumerate(zip(right, self.pieces, strict=True))
                if not on and piece]  # fmt: skip
        if len(free) < sum(right):
            return None
        drawn = set(rng.choice(free, size=sum(right), replace=False).tolist())
        return replace(self, marks=tuple(i in drawn for i in range(len(right))))

    def plain(self) -> str:
        """The text in one line."""
        return shown("".join(self.pieces))

    def written(self) -> str:
        """The text in one line, with marked tokens, or several in a row, between << and >>."""
        marks = self.marks or (False,) * len(self.pieces)
        out = ""
        for on, run in groupby(zip(self.pieces, marks, strict=True), key=itemgetter(1)):
            # The text's own arrows must not look like marks, nor join with them.
            text = re.sub("<(?=<)", "< ", re.sub(">(?=>)", "> ", shown("".join(p for p, _ in run))))
            if on:
                out += " " * out.endswith("<") + "<<" + " " * text.startswith("<")
                out += text + " " * text.endswith(">") + ">>"
            else:
                out += " " * (text.startswith(">") and bool(out)) + text
        return out


@dataclass(frozen=True)
class Cutter:
    """Cuts windows of `size` tokens from a text."""

    text: Text
    tokenizer: Any
    size: int

    @cached_property
    def by_token(self) -> tuple[np.ndarray, np.ndarray]:
        """All places, sorted by their token, and the tokens in that order."""
        order = np.argsort(self.text.ids, kind="stable")
        return order, self.text.ids[order]

    def holding(self, token: int) -> np.ndarray:
        """The places of a token, ascending, int64."""
        order, ids = self.by_token
        first, stop = np.searchsorted(ids, [token, token + 1])
        return order[first:stop]

    def span(self, place: int) -> tuple[int, int]:
        """First place and place behind the last of the window around `place`.

        It does not leave the context, and has no BOS.
        """
        context = int(self.text.context[place])
        low, high = (int(self.text.offsets[context + i]) for i in (0, 1))
        low += 1 if high - low > 1 and not self.text.counts[low] else 0
        first = max(low, min(place - int(self.size * _BEFORE), high - self.size))
        return first, min(high, first + self.size)

    def window(self, place: int, places: np.ndarray, values: np.ndarray) -> Window:
        """The window around `place`, for a feature that fires at `places` with `values`."""
        first, stop = self.span(place)
        here = slice(*np.searchsorted(places, [first, stop]).tolist())
        at = np.zeros(stop - first)
        at[places[here] - first] = values[here]
        pieces = token_pieces(self.tokenizer, self.text.ids[first:stop].tolist())
        document = int(self.text.document[self.text.context[place]])
        return Window(document, first, tuple(pieces), tuple(at.tolist()))


def overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    """Whether `span` shares a place with one of `others`."""
    return any(span[0] < stop and first < span[1] for first, stop in others)
