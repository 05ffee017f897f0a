"""Features across layers: born, passed on, transformed, vanished.

Each layer is held against the one before, by the directions of decoder rows (cosine) and by firing
on the same tokens (phi). *Passed on*: a feature of the layer before has both. *Transformed*: none
has both, but one has something of either, and `change` says what is new. *Born*: none has even
that. *Vanished*: a feature that no feature of the next layer has even that with. Cosine alone
misses what is handed on in another direction, and firing alone says nothing of directions: that is
why both are asked, on the text both layers were indexed on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._pairs import Indexed, check_space, pairs, unit, wilson

KINDS = ("passed on", "transformed", "born", "vanished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where the kinds begin."""

    cosine: float = 0.7
    """What is passed on keeps its direction to this cosine,"""
    phi: float = 0.5
    """and its firing to this correlation."""
    loose_cosine: float = 0.5
    """What is transformed has this cosine with its predecessor,"""
    loose_phi: float = 0.3
    """or this correlation."""
    least: int = 10
    """Tokens a feature must fire on to be followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A feature of a layer and the one it comes from, with the data that say so."""

    before: int
    after: int
    kind: str
    """`passed on` or `transformed`."""
    change: str | None
    """Of what is transformed: `direction` (it fires with its predecessor, and points elsewhere),
    `firing` (the reverse), or `degree`: something of both is left, and not enough of one."""
    cosine: float
    phi: float
    together: int
    """Tokens on which both fire."""
    before_tokens: int
    after_tokens: int

    def json(self) -> dict[str, Any]:
        """The same as a dict, with the conditional shares and their 95% intervals."""
        out: dict[str, Any] = {
            "before": self.before, "after": self.after, "kind": self.kind, "change": self.change,
            "cosine": self.cosine, "phi": self.phi, "together": self.together,
        }  # fmt: skip
        for name, n in (
            ("after_given_before", self.before_tokens),
            ("before_given_after", self.after_tokens),
        ):
            low, high = wilson(self.together, n)
            out[name] = {"value": self.together / n, "low": low, "high": high}
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A layer and the one before it."""

    before: str
    after: str
    links: dict[int, Link]
    """By the feature of the later layer."""
    born: list[int]
    """Features of the later layer without a predecessor."""
    vanished: list[int]
    """Features of the earlier layer without a successor."""
    successors: dict[int, Link]
    """Of features of the earlier layer, the best link to the later one."""
    layers: tuple[int, int]
    """The first that either writes."""
    silent: tuple[int, int]
    """Features of either layer that fire too seldom to be followed."""

    @property
    def counts(self) -> dict[str, int]:
        """Features of each kind."""
        kinds = [link.kind for link in self.links.values()]
        return {kind: kinds.count(kind) for kind in KINDS[:2]} | {
            "born": len(self.born),
            "vanished": len(self.vanished),
        }

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "before": self.before,
            "after": self.after,
            "counts": self.counts,
            "silent": {"before": self.silent[0], "after": self.silent[1]},
            "links": [self.links[j].json() for j in sorted(self.links)],
            "born": self.born,
            "vanished": self.vanished,
        }


def track_step(before: Indexed, after: Indexed, limits: Limits = Limits()) -> Step:
    """Hold every feature of a layer against those of the layer before."""
    check_space(before, after)
    left, right = unit(before.vectors), unit(after.vectors)
    from_, to = before.fired >= limits.least, after.fired >= limits.least
    back = _Best(after.d_sae)
    forward = _Best(before.d_sae)
    for block in pairs(before, after):
        cosine = left[block.first : block.stop] @ right.T
        phi = block.phi
        judged = from_[block.first : block.stop, None] & to[None]
        score = _score(cosine, phi, limits)
        score[~judged] = -np.inf
        rows = np.arange(block.first, block.stop)
        best = score.argmax(0)
        back.take(np.arange(after.d_sae), best + block.first, score.max(0),
                  _at(cosine, phi, block.both, best, 0))  # fmt: skip
        best = score.argmax(1)
        forward.take(rows, best, score.max(1), _at(cosine, phi, block.both, best, 1))
    links = {
        j: _link(back, int(back.other[j]), j, j, before, after, limits)
        for j in np.flatnonzero(back.score >= 1).tolist()
    }
    successors = {
        i: _link(forward, i, int(forward.other[i]), i, before, after, limits)
        for i in np.flatnonzero(forward.score >= 1).tolist()
    }
    return Step(
        before=before.address,
        after=after.address,
        links=links,
        born=np.flatnonzero(to & (back.score < 1)).tolist(),
        vanished=np.flatnonzero(from_ & (forward.score < 1)).tolist(),
        successors=successors,
        layers=(before.writes[0].layer, after.writes[0].layer),
        silent=(int((~from_).sum()), int((~to).sum())),
    )


class _Best:
    """The best partner of each feature so far."""

    def __init__(self, n: int):
        self.score = np.full(n, -np.inf)
        self.other = np.zeros(n, dtype=np.int64)
        self.data = np.zeros((n, 3))

    def take(self, rows: np.ndarray, other: np.ndarray, score: np.ndarray, data: np.ndarray):
        better = score > self.score[rows]
        chosen = rows[better]
        self.score[chosen], self.other[chosen] = score[better], other[better]
        self.data[chosen] = data[better]


def _score(cosine: np.ndarray, phi: np.ndarray, limits: Limits) -> np.ndarray:
    """At least 3 where a feature is passed on, at least 1 where it is transformed, else below 1.

    Of several, those come first that have something of both; among equals the sum decides.
    """
    loose = (cosine >= limits.loose_cosine).astype(float) + (phi >= limits.loose_phi)
    strict = (cosine >= limits.cosine) & (phi >= limits.phi)
    return np.where(strict, 3.0, loose) + (cosine + phi + 2) / 8


def _at(cosine: np.ndarray, phi: np.ndarray, both: np.ndarray, best: np.ndarray, axis: int):
    index = np.expand_dims(best, axis)
    return np.stack(
        [np.take_along_axis(x, index, axis).squeeze(axis) for x in (cosine, phi, both)], axis=1
    )


def _link(
    best: _Best, i: int, j: int, row: int, before: Indexed, after: Indexed, limits: Limits
) -> Link:
    cosine, phi, together = best.data[row]
    passed = cosine >= limits.cosine and phi >= limits.phi
    change = (
        "direction" if cosine < limits.loose_cosine
        else "firing" if phi < limits.loose_phi
        else "degree"
    )  # fmt: skip
    return Link(
        before=i,
        after=j,
        kind="passed on" if passed else "transformed",
        change=None if passed else change,
        cosine=float(cosine),
        phi=float(phi),
        together=int(together),
        before_tokens=int(before.fired[i]),
        after_tokens=int(after.fired[j]),
    )
