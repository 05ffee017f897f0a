"""Scores: how well an explanation tells, on documents it was not made from, where a feature fires.

Each is a balanced accuracy: the mean of the share of right answers where yes is right and where no
is, so that saying yes to everything gives 0.5. Its interval combines the Wilson intervals of the
two shares (Newcombe's method). The null is the same score, on the same windows, of the
explanation of another feature.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from gemscope.errors import InputError, did_you_mean
from gemscope.features import Explanation, Score

from ._judges import Judge
from ._rule_scores import wilson
from ._sampling import LEAST, Sampler
from ._windows import Window

SCORES = ("detection", "fuzzing", "contrast")


@dataclass(frozen=True, slots=True)
class Questions:
    """The windows of one score."""

    name: str
    yes: list[Window]
    """Those of which yes is the right answer."""
    no: list[Window]
    kinds: dict[str, int]
    """How many of `no` are of which kind."""

    def shuffled(self, seed: list[int]) -> tuple[list[Window], np.ndarray]:
        """All windows in random order, and to which of them the answer is yes."""
        windows = [*self.yes, *self.no]
        order = np.random.default_rng(seed).permutation(len(windows))
        return [windows[i] for i in order], (np.arange(len(windows)) < len(self.yes))[order]

    @property
    def documents(self) -> list[int]:
        """Where they are from."""
        return sorted({window.document for window in (*self.yes, *self.no)})


def check_scores(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once; refuses one that is no score."""
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in SCORES:
            raise InputError(f"no score {name!r}; {did_you_mean(name, SCORES)}")
    return found


def questions(
    sampler: Sampler, explanation: Explanation, names: Sequence[str], count: int
) -> tuple[list[Questions], dict[str, str]]:
    """The windows of each score, up to `count` of either answer; and why there are none."""
    found: list[Questions] = []
    why: dict[str, str] = {}
    for name in names:
        made = _make(sampler, explanation, name, count)
        if len(made.yes) < LEAST:
            why[name] = "it fires in too few windows of the documents kept for scoring"
        elif len(made.no) < LEAST:
            why[name] = _NO_NEGATIVES[name]
        else:
            found.append(made)
    return found, why


_NO_NEGATIVES = {
    "detection": "it fires in nearly every window",
    "fuzzing": "it fires on most tokens of its windows",
    "contrast": "too few windows are known in which neighbours or its tokens are and it is silent",
}


def _make(sampler: Sampler, explanation: Explanation, name: str, count: int) -> Questions:
    feature = explanation.feature
    if name == "fuzzing":
        windows = sampler.firing(explanation, 2 * count, purpose=4)
        right = [w.marked() for w in windows[::2]]
        rng = np.random.default_rng([sampler.seed, feature, 5])
        wrong = [m for w in windows[1::2] if (m := w.mismarked(rng)) is not None]
        return Questions(name, right, wrong, {"random positions": len(wrong)})
    positives = sampler.firing(explanation, count)
    if name == "detection":
        silent = sampler.silent(explanation, count, positives)
        kind = "random" if sampler.firings.activations else "elsewhere in its contexts"
        return Questions(name, positives, silent, {kind: len(silent)})
    hard = sampler.hard(explanation, count, positives)
    return Questions(name, positives, hard.all, hard.kinds)


def score(
    asked: Questions,
    explanation: Explanation,
    other: Explanation | None,
    judge: Judge,
    *,
    seed: int,
    paths: Sequence[str],
) -> Score:
    """Judge the windows in random order by an explanation, and by that of another feature."""
    shuffled, truth = asked.shuffled([seed, explanation.feature])
    verdicts = judge.judge(explanation, shuffled)
    right, value, low, high = graded(verdicts, truth)
    detail = {
        "judge": judge.name,
        "recall": float(right[truth].mean()),
        "specificity": float(right[~truth].mean()),
        "yes": int(truth.sum()),
        "no": asked.kinds,
        "seed": seed,
        "documents": [paths[d] for d in asked.documents],
    }
    null = None
    if other is not None:
        answers = judge.judge(other, shuffled)
        _, null, null_low, null_high = graded(answers, truth)
        detail |= {
            "null_low": null_low,
            "null_high": null_high,
            "null_feature": other.feature,
            "null_text": other.text,
            "null_failures": sum(a is None for a in answers),
        }
    failures = sum(v is None for v in verdicts)
    return Score(name=asked.name, value=value, low=low, high=high, null=null, n=len(shuffled),
                 failures=failures, detail=detail)  # fmt: skip


def graded(
    answers: Sequence[bool | None], truth: np.ndarray
) -> tuple[np.ndarray, float, float, float]:
    """Which answers are right (an unreadable one is not), and balanced accuracy with interval."""
    right = np.array([a is not None and a == t for a, t in zip(answers, truth, strict=True)])
    shares = [(int(right[side].sum()), int(side.sum())) for side in (truth, ~truth) if side.any()]
    return right, *balanced(shares)


def balanced(shares: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """The mean of some shares `(right, of)` with its 95% interval."""
    rates = [right / of for right, of in shares]
    ends = [wilson(float(right), float(of)) for right, of in shares]
    value = sum(rates) / len(rates)
    below = sqrt(sum((rate - low) ** 2 for rate, (low, _) in zip(rates, ends, strict=True)))
    above = sqrt(sum((high - rate) ** 2 for rate, (_, high) in zip(rates, ends, strict=True)))
    return value, max(0.0, value - below / len(rates)), min(1.0, value + above / len(rates))


def others(explanations: Sequence[Explanation], *, seed: int) -> list[Explanation | None]:
    """For each explanation that of another feature, with another text: in a random circle."""
    order = np.random.default_rng([seed, 7]).permutation(len(explanations)).tolist()
    out: list[Explanation | None] = [None] * len(explanations)
    for turn, mine in enumerate(order):
        own = explanations[mine]
        for step in range(1, len(order)):
            other = explanations[order[(turn + step) % len(order)]]
            if other.feature != own.feature and other.text.casefold() != own.text.casefold():
                out[mine] = other
                break
    return out
