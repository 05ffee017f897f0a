"""Splitting and absorption between dictionaries of one site and growing width.

A general feature of a narrow dictionary is looked for in a wider one. It is *kept* where one wide
feature has its direction and fires with it, on most of its tokens; it *splits* where several
exclusive ones share its tokens; it is *lost* otherwise. A kept feature is *absorbed in part* where
its wide counterpart is silent on tokens of the concept (the narrow feature fires) because a more
specific wide feature fires there whose decoder row points the same way, so that nothing is lost by
the silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from gemscope.errors import InputError

from ._pairs import Indexed, check_space, pairs, unit, wilson
from ._relations import Rules, splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Where the types begin."""

    cosine: float = 0.5
    """Decoder rows of a feature and its counterpart have this cosine."""
    phi: float = 0.3
    """And their firing this correlation: absorption itself lowers it."""
    most: float = 0.5
    """And the counterpart fires on this share of the feature's tokens: less is a split."""
    child_cosine: float = 0.1
    """Decoder rows of a counterpart and of a child that absorbs it have this cosine."""
    silent: float = 0.5
    """The counterpart is silent on this share of the child's tokens of the concept."""
    rules: Rules = field(default_factory=Rules)
    """`part` and `least` say what a child is, and all of it what a split is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorbed:
    """A feature of the narrow dictionary whose counterpart in the wide one goes silent."""

    feature: int
    counterpart: int
    children: list[dict[str, Any]]
    """Each with `feature`, `tokens` (the concept and the child), `silent` of them, `cosine`."""
    tokens: int
    """Tokens of the concept: the narrow feature fires."""
    absorbed: int
    """Those of them on which the counterpart is silent and a child fires."""

    @property
    def rate(self) -> float:
        """Share of the concept's tokens that are absorbed."""
        return self.absorbed / self.tokens

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        low, high = wilson(self.absorbed, self.tokens)
        return {
            "feature": self.feature,
            "counterpart": self.counterpart,
            "tokens": self.tokens,
            "absorbed": self.absorbed,
            "rate": self.rate,
            "low": low,
            "high": high,
            "children": self.children,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderStep:
    """What becomes of a narrow dictionary's features in a wider one; counts of features."""

    narrow: str
    wide: str
    features: int
    """Judged: they fire on enough tokens."""
    kept: int
    split: int
    """Those that are not kept, and split."""
    lost: int
    absorbed: list[Absorbed]
    """Of those kept, the ones absorbed in part, the highest rate first."""
    rate: float
    """Tokens absorbed, as a share of all tokens of the concepts that are kept."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        names = ("narrow", "wide", "features", "kept", "split", "lost", "rate")
        return {name: getattr(self, name) for name in names} | {
            "absorbed": [one.json() for one in self.absorbed]
        }


def ladder(dictionaries: Sequence[Indexed], settings: Ladder = Ladder()) -> list[LadderStep]:
    """Each dictionary of a site against the next wider one, on one text."""
    if len(dictionaries) < 2:
        raise InputError("a ladder has two widths or more; give dictionaries of one site")
    rungs = sorted(dictionaries, key=lambda one: one.d_sae)
    return [_step(a, b, settings) for a, b in pairwise(rungs)]


def _step(narrow: Indexed, wide: Indexed, settings: Ladder) -> LadderStep:
    check_space(narrow, wide)
    if narrow.writes != wide.writes:
        raise InputError(f"{narrow.address} and {wide.address} are not of one site")
    left, right = unit(narrow.vectors), unit(wide.vectors)
    judged = narrow.fired >= settings.rules.least
    counterparts: dict[int, int] = {}
    children: dict[int, np.ndarray] = {}
    for block in pairs(narrow, wide):
        cosine, phi = left[block.first : block.stop] @ right.T, block.phi
        same = (cosine >= settings.cosine) & (phi >= settings.phi)
        match = np.where(same & (block.b_given_a >= settings.most), phi, -1.0)
        inside = (block.a_given_b >= settings.rules.part) & (wide.fired >= settings.rules.least)
        inside &= block.a_given_b * block.tokens >= settings.rules.lift * block.a[:, None]
        for i in np.flatnonzero(match.max(1) >= 0):
            feature = int(i) + block.first
            if judged[feature]:
                best = int(match[i].argmax())
                counterparts[feature] = best
                near = right @ right[best] >= settings.child_cosine
                near[best] = False
                children[feature] = np.flatnonzero(inside[i] & near)
    found = [
        one
        for feature, best in counterparts.items()
        if (one := _absorbed(narrow, wide, right, feature, best, children[feature], settings))
    ]
    parted = {r.feature for r in splits(narrow, wide, settings.rules)} - set(counterparts)
    tokens = int(narrow.fired[list(counterparts)].sum())
    total = int(judged.sum())
    return LadderStep(
        narrow=narrow.address,
        wide=wide.address,
        features=total,
        kept=len(counterparts),
        split=len(parted),
        lost=total - len(counterparts) - len(parted),
        absorbed=sorted(found, key=lambda one: (-one.rate, one.feature)),
        rate=sum(one.absorbed for one in found) / max(tokens, 1),
    )


def _absorbed(
    narrow: Indexed, wide: Indexed, directions: np.ndarray, feature: int, counterpart: int,
    children: np.ndarray, settings: Ladder,
) -> Absorbed | None:  # fmt: skip
    """The tokens of the concept on which a child speaks and the counterpart does not."""
    concept = narrow.activations.of(narrow.address, feature)[0]
    spoken = wide.activations.of(wide.address, counterpart)[0]
    silent = np.setdiff1d(concept, spoken, assume_unique=True)
    usual, told, places = len(silent) / len(concept), [], []
    for child in children:
        here = np.intersect1d(
            concept, wide.activations.of(wide.address, int(child))[0], assume_unique=True
        )
        quiet = np.intersect1d(here, silent, assume_unique=True)
        # Silence must go with the child: more of it than on the concept's tokens in general.
        if len(here) < settings.rules.least or len(quiet) < settings.silent * len(here):
            continue
        if wilson(len(quiet), len(here))[0] <= usual:
            continue
        cosine = float(directions[child] @ directions[counterpart])
        told.append(
            {"feature": int(child), "tokens": len(here), "silent": len(quiet), "cosine": cosine}
        )
        places.append(quiet)
    if not told:
        return None
    absorbed = len(np.unique(np.concatenate(places)))
    told.sort(key=lambda row: (-row["silent"], row["feature"]))
    return Absorbed(
        feature=feature, counterpart=counterpart, children=told, tokens=len(concept),
        absorbed=absorbed,
    )  # fmt: skip
