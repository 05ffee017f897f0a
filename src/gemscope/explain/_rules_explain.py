"""Rules for the features of a dictionary: learned on some documents, scored on others."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Activations, Entries, Explanation, Score, Text

from ._conditions import Conditions
from ._learn import Learned, Learner, RuleSettings
from ._rule_scores import Documents, Held, Prediction, rule_score, simulation_score
from ._rule_split import DocumentSplit, ranges, split_documents

AUTHOR = "gemscope rules 1"
_BLOCK = 256
"""Features whose activations are in memory at a time, and among which a null is sought."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RuleText:
    """A text made ready for rules: for every dictionary that was indexed on it."""

    text: Text
    conditions: Conditions
    """Of the documents that are used."""
    split: DocumentSplit
    settings: RuleSettings
    places: np.ndarray
    """The place in the text of each place of `conditions`, ascending."""

    @classmethod
    def of(
        cls,
        text: Text,
        tokenizer: Any,
        settings: RuleSettings = RuleSettings(),
        *,
        progress: Progress | None = None,
    ) -> "RuleText":
        """Split the documents and read the conditions, which takes some seconds."""
        split = split_documents(
            text, held_out=settings.held_out, tokens=settings.tokens, seed=settings.seed
        )
        used, places = _of_documents(text, np.concatenate([split.training, split.held_out]))
        conditions = Conditions.of(used, tokenizer, progress=progress)
        return cls(text, conditions, split, settings, places)

    @cached_property
    def learner(self) -> Learner:
        """Of the training places."""
        here = np.searchsorted(self.places, self.split.training_places)
        return Learner(self.conditions, here, self.settings)

    @cached_property
    def held_out(self) -> Conditions:
        """At the held-out places."""
        return self.conditions.at(np.searchsorted(self.places, self.split.held_out_places))

    @cached_property
    def documents(self) -> Documents:
        """The documents of the held-out places."""
        document = self.text.document_of(self.split.held_out_places)
        return Documents(np.unique(document, return_inverse=True)[1])

    @cached_property
    def rank(self) -> np.ndarray:
        """Of each place, its index among the training or among the held-out places; -1 - that of
        the held-out ones, and the number of places where it is neither.
        """
        rank = np.full(len(self.text.ids), len(self.text.ids), dtype=np.int64)
        rank[self.split.training_places] = np.arange(len(self.split.training_places))
        rank[self.split.held_out_places] = -1 - np.arange(len(self.split.held_out_places))
        return rank


def _of_documents(text: Text, documents: np.ndarray) -> tuple[Text, np.ndarray]:
    """The contexts of some documents as a text of their own, and the places they are at."""
    kept = np.isin(text.document, documents)
    if kept.all():
        return text, np.arange(len(text.ids))
    lengths = np.diff(text.offsets)[kept]
    places = np.flatnonzero(kept[text.context])
    part = Text(
        ids=text.ids[places], counts=text.counts[places],
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        document=text.document[kept], start=text.start[kept], paths=text.paths,
        sources=text.sources, source=text.source,
    )  # fmt: skip
    return part, places


def explain_by_rules(
    text: Text,
    activations: Activations,
    address: str,
    *,
    tokenizer: Any,
    settings: RuleSettings = RuleSettings(),
    features: Iterable[int] | None = None,
    prepared: RuleText | None = None,
    progress: Progress | None = None,
) -> Iterator[Explanation]:
    """The rules of a dictionary's features, or of `features`, each with its scores.

    Nothing is given of a feature that fires on fewer than `settings.least` training tokens, or for
    which nothing is better than no rule; a feature that is silent on the held-out documents has a
    rule without scores. `prepared` spares reading the text again for the next dictionary.
    """
    d_sae = activations.d_sae(address)
    wanted = set(range(d_sae)) if features is None else {int(f) for f in features}
    for feature in wanted:
        if not 0 <= feature < d_sae:
            raise InputError(f"no feature {feature}: {address} has 0 to {d_sae - 1}")
    ready = prepared or RuleText.of(text, tokenizer, settings, progress=progress)
    if len(ready.text.ids) != len(text.ids):
        raise InputError(f"the prepared text is not the one that {address} was indexed on")
    done = 0
    for first in range(0, d_sae, _BLOCK):
        stop = min(first + _BLOCK, d_sae)
        here = sorted(f - first for f in wanted if first <= f < stop)
        if not here:
            continue
        block = _Block(ready, activations.entries(address, first, stop))
        for feature in here:
            made = block.explain(feature, address, first)
            done += 1
            if progress is not None:
                progress(f"rules of {address}", done, len(wanted))
            if made is not None:
                yield made


class _Block:
    """Some features of a dictionary, each learned at most once."""

    def __init__(self, ready: RuleText, entries: Entries):
        self.ready, self.entries = ready, entries
        rank = ready.rank[entries.places]
        self._training = np.where((rank >= 0) & (rank < len(ready.text.ids)), rank, -1)
        self._held = np.where(rank < 0, -1 - rank, -1)
        feature = entries.features[self._training >= 0]
        counts = np.bincount(feature, minlength=len(entries.offsets) - 1)
        able = np.flatnonzero(counts >= ready.settings.least)
        self._order = able[np.argsort(counts[able], kind="stable")]
        """Features that may have a rule, by how often they fire."""
        self._rules: dict[int, Learned | None] = {}
        self._said: dict[int, Prediction] = {}

    def explain(self, feature: int, address: str, first: int) -> Explanation | None:
        """The feature's rule and its scores; None if it has no rule."""
        learned = self._rule(feature)
        if learned is None:
            return None
        held, ready = self._on_held_out(feature), self.ready
        scores: tuple[Score, ...] = ()
        if 0 < len(held.fires) < len(ready.split.held_out_places):
            own, null = self._prediction(feature), self._null(feature)
            scores = (
                rule_score(ready.documents, held, own, null),
                simulation_score(ready.documents, held, own, null),
            )
        detail = {
            "rule": learned.rule.json(),
            "levels": [round(float(v), 4) for v in self._prediction(feature).levels],
            "training": self._seen(feature, learned) | {
                "documents": ranges(ready.split.training),
                "tokens": len(ready.split.training_places),
            },
            "held_out": {
                "documents": ranges(ready.split.held_out),
                "tokens": len(ready.split.held_out_places),
            },
            "seed": ready.settings.seed,
        }  # fmt: skip
        return Explanation(
            dictionary=address, feature=first + feature, text=learned.rule.text, method="rule",
            author=AUTHOR, scores=scores, detail=detail,
        )  # fmt: skip

    def _slice(self, feature: int) -> slice:
        return slice(int(self.entries.offsets[feature]), int(self.entries.offsets[feature + 1]))

    def _fires(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices into the training places, and activations."""
        here = self._slice(feature)
        ranks, values = self._training[here], self.entries.values[here]
        return ranks[ranks >= 0], values[ranks >= 0]

    def _on_held_out(self, feature: int) -> Held:
        here = self._slice(feature)
        ranks, values = self._held[here], self.entries.values[here]
        return Held(ranks[ranks >= 0], values[ranks >= 0])

    def _rule(self, feature: int) -> Learned | None:
        if feature not in self._rules:
            self._rules[feature] = self.ready.learner.learn(self._fires(feature)[0])
        return self._rules[feature]

    def _levels(self, feature: int) -> np.ndarray:
        """What each term predicts: the mean activation where it is the first that holds."""
        learned = self._rules[feature]
        assert learned is not None
        fires, values = self._fires(feature)
        size = len(learned.rule.terms) + 1
        sums = np.bincount(1 + learned.which[fires].astype(np.int64), values, size)
        counts = [np.count_nonzero(learned.which == term) for term in range(size - 1)]
        return sums[1:] / np.maximum(counts, 1)

    def _prediction(self, feature: int) -> Prediction:
        if feature not in self._said:
            learned = self._rules[feature]
            assert learned is not None
            which = learned.rule.which(self.ready.held_out)
            self._said[feature] = Prediction(which, self._levels(feature))
        return self._said[feature]

    def _null(self, feature: int) -> Prediction | None:
        """Of the next denser feature that has a rule; after the densest comes the rarest."""
        at = int(np.flatnonzero(self._order == feature)[0])
        for other in np.roll(self._order, -at)[1:].tolist():
            if self._rule(other) is not None:
                return self._prediction(other)
        return None

    def _seen(self, feature: int, learned: Learned) -> dict[str, Any]:
        """How the rule does on what it was learned from."""
        fires = self._fires(feature)[0]
        said = learned.which >= 0
        hits, silent = int(np.count_nonzero(said[fires])), len(said) - len(fires)
        false = int(np.count_nonzero(said)) - hits
        return {
            "firing": len(fires),
            "balanced_accuracy": round(0.5 * (hits / len(fires) + 1 - false / silent), 4),
        }
