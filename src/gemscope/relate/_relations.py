"""Types of relation between features, from where they fire and what they write.

Within one dictionary: parent and child, sibling, duplicate, opposite. Between two dictionaries of
a site on one text, the narrower first: the same, and splits into. Each comes with the counts it
rests on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._pairs import Indexed, Pairs, check_space, pairs, unit, wilson

KINDS = ("parent", "child", "sibling", "duplicate", "splits into", "opposite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Where the types begin; every figure is of tokens on which features fire."""

    least: int = 20
    """Tokens a feature must fire on to be judged."""
    within: float = 0.9
    """A child fires where its parent does on this share of its own tokens."""
    apart: float = 0.5
    """A parent fires where its child does on at most this share of its own tokens."""
    lift: float = 2.0
    """A child's tokens hold the parent this many times as often as all tokens do."""
    same: float = 0.8
    """Duplicates fire on this share of each other's tokens."""
    alike: float = 0.7
    """Duplicates have decoder rows of this cosine."""
    exclusive: float = 0.1
    """Siblings, and the parts of a split, have at most this Jaccard index."""
    part: float = 0.7
    """A part of a split fires where the whole does on this share of its own tokens."""
    cover: float = 0.7
    """The parts of a split fire on this share of the whole's tokens."""
    largest: float = 0.75
    """No part of a split has more than this share of what the parts cover: else it is the whole
    over again, with exceptions."""
    opposed: float = -0.5
    """Opposites have decoder rows of at most this cosine."""
    siblings: int = 10
    """Siblings told of a feature at most, those with the most similar decoder rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """`feature` of `dictionary` has the relation `kind` to `other` of `other_dictionary`.

    Kind `parent`: `feature` is a parent of `other`.
    """

    dictionary: str
    feature: int
    other_dictionary: str
    other: int
    kind: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        names = ("dictionary", "feature", "other_dictionary", "other", "kind")
        return {name: getattr(self, name) for name in names} | {"evidence": dict(self.evidence)}


def relations(one: Indexed, rules: Rules = Rules(), feature: int | None = None) -> list[Relation]:
    """Relations within a dictionary, of all its features or of one, by feature and kind.

    Parent and child are both told, each from its side; other kinds too.
    """
    directions, found = unit(one.vectors), []
    parents: dict[int, list[int]] = {}
    enough = one.fired >= rules.least
    for block in pairs(one):
        cosine = directions[block.first : block.stop] @ directions.T
        below = _below(block, enough, rules)
        for i, j in zip(*np.nonzero(below), strict=True):
            parents.setdefault(int(i) + block.first, []).append(int(j))
        children = _told(one, one, block, cosine, below, "child")
        found += children + _turned(children)
        for kind, where in (("duplicate", _duplicates), ("opposite", _opposites)):
            chosen = where(block, cosine, enough, rules)
            found += _told(one, one, block, cosine, chosen, kind)
    found += _siblings(one, directions, parents, rules)
    if feature is not None:
        found = [r for r in found if r.feature == feature]
    return sorted(found, key=lambda r: (r.feature, KINDS.index(r.kind), -_strength(r), r.other))


def splits(
    narrow: Indexed, wide: Indexed, rules: Rules = Rules(), feature: int | None = None
) -> list[Relation]:
    """Features of a narrow dictionary that split into several of a wide one at the same site.

    Parts are taken from the most frequent on, as long as they fire hardly ever together with those
    taken before; together they must cover the whole. One relation for each part.
    """
    check_space(narrow, wide)
    left, right, found = unit(narrow.vectors), unit(wide.vectors), []
    enough = wide.fired >= rules.least
    for block in pairs(narrow, wide):
        cosine = left[block.first : block.stop] @ right.T
        inside = (block.a_given_b >= rules.part) & enough & (cosine > 0)
        inside &= block.a_given_b * block.tokens >= rules.lift * block.a[:, None]
        for row in np.flatnonzero((inside.sum(1) >= 2) & (block.a >= rules.least)):
            whole = int(row) + block.first
            if feature is None or feature == whole:
                found += _split(
                    narrow, wide, block, cosine, int(row), np.flatnonzero(inside[row]), rules
                )
    return found


def _below(block: Pairs, enough: np.ndarray, rules: Rules) -> np.ndarray:
    """Where the block's feature is a child of the other."""
    inside, around = block.b_given_a, block.a_given_b
    share = block.b / max(block.tokens, 1)
    return (
        (inside >= rules.within)
        & (around <= rules.apart)
        & (inside >= rules.lift * share)
        & _judged(block, enough)
    )


def _duplicates(block: Pairs, cosine: np.ndarray, enough: np.ndarray, rules: Rules) -> np.ndarray:
    both = np.minimum(block.b_given_a, block.a_given_b) >= rules.same
    return both & (cosine >= rules.alike) & _judged(block, enough)


def _opposites(block: Pairs, cosine: np.ndarray, enough: np.ndarray, rules: Rules) -> np.ndarray:
    return (cosine <= rules.opposed) & _judged(block, enough)


def _judged(block: Pairs, enough: np.ndarray) -> np.ndarray:
    judged = enough[block.first : block.stop, None] & enough[None]
    judged[np.arange(len(judged)), np.arange(block.first, block.stop)] = False
    return judged


def _told(
    one: Indexed, other: Indexed, block: Pairs, cosine: np.ndarray, where: np.ndarray, kind: str
) -> list[Relation]:
    return [
        Relation(
            dictionary=one.address,
            feature=int(i) + block.first,
            other_dictionary=other.address,
            other=int(j),
            kind=kind,
            evidence=_evidence(block, cosine, int(i), int(j)),
        )
        for i, j in zip(*np.nonzero(where), strict=True)
    ]


def _evidence(block: Pairs, cosine: np.ndarray, i: int, j: int) -> dict[str, Any]:
    return pair_evidence(
        int(block.both[i, j]), int(block.a[i]), int(block.b[j]), block.tokens, float(cosine[i, j])
    )


def pair_evidence(both: int, a: int, b: int, tokens: int, cosine: float) -> dict[str, Any]:
    """Counts of a pair and what follows from them; conditional shares with 95% intervals."""
    spread = (a * (tokens - a)) ** 0.5 * (b * (tokens - b)) ** 0.5
    return {
        "together": both,
        "feature_tokens": a,
        "other_tokens": b,
        "other_given_feature": _share(both, a),
        "feature_given_other": _share(both, b),
        "phi": (both * tokens - a * b) / spread if spread else 0.0,
        "jaccard": both / max(a + b - both, 1),
        "cosine": cosine,
    }


def _share(k: int, n: int) -> dict[str, float]:
    low, high = wilson(k, n)
    return {"value": k / n if n else 0.0, "low": low, "high": high}


def _turned(found: Iterable[Relation]) -> list[Relation]:
    """The same relations from the parent's side."""
    out = []
    for r in found:
        e = dict(r.evidence)
        e["feature_tokens"], e["other_tokens"] = e["other_tokens"], e["feature_tokens"]
        names = ("other_given_feature", "feature_given_other")
        e[names[0]], e[names[1]] = e[names[1]], e[names[0]]
        out.append(
            Relation(
                dictionary=r.other_dictionary, feature=r.other, other_dictionary=r.dictionary,
                other=r.feature, kind="parent", evidence=e,
            )
        )  # fmt: skip
    return out


def _siblings(
    one: Indexed, directions: np.ndarray, parents: Mapping[int, list[int]], rules: Rules
) -> list[Relation]:
    """Pairs with a parent in common that hardly fire together."""
    children: dict[int, list[int]] = {}
    for child, above in parents.items():
        for parent in above:
            children.setdefault(parent, []).append(child)
    found = []
    for block in pairs(one):
        cosine = directions[block.first : block.stop] @ directions.T
        jaccard = block.jaccard
        for i in range(len(block.a)):
            child = i + block.first
            shared: dict[int, list[int]] = {}
            for parent in parents.get(child, ()):
                for other in children[parent]:
                    if other != child and jaccard[i, other] <= rules.exclusive:
                        shared.setdefault(other, []).append(parent)
            nearest = sorted(shared, key=lambda j: (-float(cosine[i, j]), j))[: rules.siblings]
            for other in nearest:
                evidence = _evidence(block, cosine, i, other) | {"parents": sorted(shared[other])}
                found.append(
                    Relation(
                        dictionary=one.address, feature=child, other_dictionary=one.address,
                        other=other, kind="sibling", evidence=evidence,
                    )
                )  # fmt: skip
    return found


def _split(
    narrow: Indexed, wide: Indexed, block: Pairs, cosine: np.ndarray, row: int,
    candidates: np.ndarray, rules: Rules,
) -> list[Relation]:  # fmt: skip
    """The parts of one feature, if there are two or more and they cover it."""
    whole = set(narrow.activations.of(narrow.address, row + block.first)[0].tolist())
    taken: list[tuple[int, set[int]]] = []
    for other in candidates[np.argsort(-block.both[row, candidates], kind="stable")]:
        places = set(wide.activations.of(wide.address, int(other))[0].tolist())
        if all(
            len(places & before) <= rules.exclusive * len(places | before) for _, before in taken
        ):
            taken.append((int(other), places))
    covered = len(whole & set().union(*(places for _, places in taken)))
    largest = max((len(whole & places) for _, places in taken), default=0)
    if len(taken) < 2 or covered < rules.cover * len(whole) or largest > rules.largest * covered:
        return []
    group = {
        "parts": [other for other, _ in taken],
        "covered": _share(covered, len(whole)),
    }
    return [
        Relation(
            dictionary=narrow.address, feature=row + block.first, other_dictionary=wide.address,
            other=other, kind="splits into", evidence=_evidence(block, cosine, row, other) | group,
        )
        for other, _ in taken
    ]  # fmt: skip


def _strength(relation: Relation) -> float:
    evidence = relation.evidence
    return abs(evidence["cosine"]) if relation.kind == "opposite" else evidence["phi"]
