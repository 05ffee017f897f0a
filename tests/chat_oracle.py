"""Answers to the prompts of `gemscope explain` by someone who knows the truth.

It reads the prompts alone: it looks for the texts in the indexed text, and at what fires there.
Its labels are `feature number N`, which it understands when asked to judge.
"""

import json
import re
from functools import lru_cache

import numpy as np

from gemscope.features import Store, token_pieces

_ASKED = re.compile(r"The list of (\d+) numbers:\Z")


class Oracle:
    """A perfect reader of the features `features` of a dictionary."""

    def __init__(self, folder, address, features):
        store = Store.open(folder)
        self.text = store.text(address)
        activations = store.activations(address)
        self.fires = {}
        for feature in features:
            values = np.zeros(len(self.text.ids))
            places, found = activations.of(address, feature)
            values[places] = found
            self.fires[feature] = values
        self.pieces, tokenizer = [], store.tokenizer(address)
        for first, stop in zip(self.text.offsets, self.text.offsets[1:], strict=False):
            # The first token of a context is BOS, which no window holds.
            self.pieces += [
                "\0",
                *token_pieces(tokenizer, self.text.ids[first + 1 : stop].tolist()),
            ]
        shown = [
            "".join({"\n": "⏎", "\r": "⏎", "\t": "⇥"}.get(c, c) for c in p) for p in self.pieces
        ]
        self.begins = np.cumsum([0, *map(len, shown)])
        self.whole = "".join(shown)
        self.marked = lru_cache(maxsize=None)(self._marked)

    def __call__(self, messages):
        user = messages[1][1] if isinstance(messages[1], tuple) else messages[1]["content"]
        asked = _ASKED.search(user)
        if not asked:
            examples = [self.marked(t) for t in re.findall(r"^\d+\. (.*)\n   \"", user, re.M)]
            return f"Label: feature number {self.named(examples)}"
        feature = int(re.search(r"feature number (\d+)", user)[1])
        body = user.split("\n\n", 2)[2].rsplit("\n\n", 1)[0]
        texts = re.findall(r"^\d+\. (.*)$", body, re.M)
        assert len(texts) == int(asked[1])
        return json.dumps(
            [int(self.fits(text, feature, "Are the marked" in user)) for text in texts]
        )

    def _marked(self, text):
        """`[(places, marked places)]` of a text with marks, wherever it stands."""
        pattern = ""
        for number, part in enumerate(re.split(r"<<|>>", text)):
            # Arrows of the text itself are kept apart from marks with spaces.
            part = re.sub(r"(?<=[<>])\\ |\\ (?=[<>])", r"\\ ?", re.escape(part))
            pattern += f"({part})" if number % 2 else part
        found = [
            (self._tokens(*m.span()), {p for group in range(1, 1 + len(m.groups()))
                                       for p in self._tokens(*m.span(group))})
            for m in re.finditer(pattern, self.whole)
        ]  # fmt: skip
        assert found, text
        return found

    def _tokens(self, low, high):
        """Places of the tokens that begin in a stretch of the text, and are not empty."""
        first, stop = np.searchsorted(self.begins, [low, high])
        return [p for p in range(first, stop) if self.pieces[p]]

    def named(self, examples):
        """The one feature that fires where the examples are marked."""
        fits = [
            feature
            for feature, values in self.fires.items()
            if all(any(self._marks(here, values) == on for here, on in found) for found in examples)
        ]
        assert len(fits) == 1, fits
        return fits[0]

    def _marks(self, here, values):
        bar = 0.3 * values[here].max()
        return {place for place in here if values[place] > bar}

    def fits(self, text, feature, marked):
        values = self.fires[feature]
        found = self.marked(text)
        if marked:
            return any(self._marks(here, values) == on for here, on in found)
        return any((values[here] > 0).any() for here, _ in found)
