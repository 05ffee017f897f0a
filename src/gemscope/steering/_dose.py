"""Dose and response: what a feature's steering does, and what it costs, strength by strength.

Continuations of several prompts are generated at every strength and without an edit, and measured
as `_dose_measure` says. Intervals are of the middle 95% of resamples of the prompts.

The knee is the last strength, counted from the weakest up, at which the text still reads as the
unsteered model's does: the perplexity of its continuations under the unsteered model is at most
twice that of the unsteered continuations, and at most a quarter more of its runs of four tokens
are repetitions. Both are needed: text that goes round in circles is no surprise to a model. Counted
up means that a strength beyond one that fails is none, whatever it says. A strength whose effect is
not told from none is passed over: the interval of its change, prompt by prompt, holds 0. There is
no knee if no strength is left. The effect is `promoted`, or `activation` of a feature whose direct
logits are not known. Strengths of both signs are two ways up; the knee is that of the way on which
the effect at it changes most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.lm import LanguageModel

from ._change import Change
from ._dose_measure import MEASURES, Row, Sums, measure
from ._modes import UNITS, Mode, Strength, Unit
from ._output_score import promoted_tokens
from ._parts import Feature
from ._positions import Positions
from ._steering import Steering

Progress = Callable[[str, int, int], None]

PROMOTED = 10
"""Tokens of a feature whose probability is its effect."""
MOST_PERPLEXITY, MOST_REPETITION = 2.0, 0.25
"""Cost up to which a strength can be the knee: times the unsteered perplexity, and share of
repetitions above the unsteered."""
_RESAMPLES = 2_000
_ROWS = 64
_ENTRIES = 2**27
"""Rows of a batch, at most, and logits that are held at once, about."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure over all prompts with its 95% interval; None without one, as of a single prompt."""

    value: float
    low: float | None
    high: float | None

    def json(self) -> dict[str, float | None]:
        """The same as a dict."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is measured at one strength, or of the unsteered model."""

    strength: Strength | None
    """None without an edit."""
    measures: dict[str, Measure | None]
    """By name, as `_dose_measure` has them; None where there is nothing to measure."""
    change: Measure | None
    """Of the effect against the unsteered one, prompt by prompt."""
    continuations: tuple[str, ...]
    """One a prompt and sample, prompt by prompt."""

    def json(self) -> dict[str, Any]:
        """What `gemscope dose --json` says of it."""
        found = {n: m and m.json() for n, m in self.measures.items()}
        return {
            "strength": None if self.strength is None else str(self.strength), **found,
            "change": self.change and self.change.json(),
            "continuations": list(self.continuations),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Dose:
    """A feature's response to a range of strengths."""

    feature: str
    maximum: float | None
    mode: Mode
    positions: Positions
    prompts: tuple[str, ...]
    promoted: tuple[str, ...] | None
    """Tokens whose probability is the effect; None where direct logits are not known."""
    baseline: Point
    points: tuple[Point, ...]
    """In the order the strengths were given in."""
    knee: Strength | None
    reason: str
    """Why this is the knee, or why there is none."""
    settings: dict[str, Any]

    @property
    def effect(self) -> str:
        """Which measure is the effect."""
        return "activation" if self.promoted is None else "promoted"

    def sizes(self) -> list[float] | None:
        """The strengths as numbers of one unit, a feature's maximum among them; None if they are
        of units that do not compare.
        """
        return sizes([p.strength for p in self.points if p.strength], self.maximum)

    def json(self) -> dict[str, Any]:
        """What `gemscope dose --json` says."""
        return {
            "feature": self.feature, "maximum": self.maximum, "mode": str(self.mode),
            "positions": str(self.positions), "prompts": list(self.prompts),
            "promoted": None if self.promoted is None else list(self.promoted),
            "effect": self.effect, "knee": None if self.knee is None else str(self.knee),
            "reason": self.reason, **self.settings, "baseline": self.baseline.json(),
            "points": [point.json() for point in self.points],
        }  # fmt: skip


def dose(
    model: LanguageModel,
    feature: Feature,
    prompts: Sequence[str],
    strengths: Sequence[Strength],
    *,
    mode: Mode = Mode.ADD,
    positions: Positions = Positions(),
    max_new_tokens: int = 40,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Dose:
    """Effect and cost of steering with `feature` at each of `strengths`, over `prompts`.

    Strengths share batches, one a row. Definitions: see `_dose_measure`; of the knee: see the
    module. `progress` is told what is done, and how many continuations of how many.

    Raises:
        InputError: Nothing to sweep, a mode without a strength, strengths that do not fit it, or
            a feature that does not fit the model.
    """
    prompts, strengths = tuple(prompts), tuple(strengths)
    _check(mode, prompts, strengths, samples)
    change = Change(what=feature, mode=mode, strength=strengths[0], positions=positions)
    for strength in strengths:
        Steering([replace(change, strength=strength)]).check(model)
    given = model.tokens(list(prompts))
    positions.check(model.lengths(given))
    found = promoted_tokens(model, feature.sae, [feature.index], PROMOTED)
    promoted = None if found is None else found[0].cpu()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
    }  # fmt: skip
    sums = [Sums(len(prompts)) for _ in range(len(strengths) + 1)]
    texts: list[list[str]] = [[] for _ in sums]
    work = _work(model, strengths, len(prompts), samples, given.ids.shape[1] + max_new_tokens)
    done, total = 0, len(sums) * len(prompts) * samples
    for batch in work:
        progress("steering", done, total)
        many = tuple(strengths[place - 1].values[0] for place, _ in batch)
        edits = []
        if batch[0][0]:
            strength = Strength(many, strengths[batch[0][0] - 1].unit)
            edits = [Steering([replace(change, strength=strength)])]
        made = model.generate([prompts[p] for _, p in batch], edits=edits, **options)
        rows = [Row(one, p, sums[at]) for one, (at, p) in zip(made, batch, strict=True)]
        measure(model, feature, promoted, given, rows, edits)
        for (at, _), one in zip(batch, made, strict=True):
            texts[at].append(one.text)
        done += len(batch)
        progress("steering", done, total)
    points = _points(strengths, sums, texts, "activation" if promoted is None else "promoted", seed)
    knee, reason = _knee(points, strengths, feature.maximum)
    words = None if promoted is None else tuple(map(model.tokenizer.decode, promoted[:, None]))
    return Dose(
        feature=feature.name, maximum=feature.maximum, mode=mode, positions=positions,
        prompts=prompts, promoted=words, baseline=points[0], points=points[1:], knee=knee,
        reason=reason, settings={"model": model.name, "samples": samples, **options},
    )  # fmt: skip


def sizes(strengths: Sequence[Strength], maximum: float | None) -> list[float] | None:
    """Strengths as numbers of one unit; None if they are of units that do not compare."""
    units = {s.unit for s in strengths if s.values[0] != 0}
    if len(units) < 2:
        return [s.values[0] for s in strengths]
    if units <= {Unit.ABSOLUTE, Unit.MAX} and maximum is not None:
        return [s.values[0] * (1.0 if s.unit is Unit.ABSOLUTE else maximum) for s in strengths]
    return None


def _check(mode: Mode, prompts: Sequence[str], strengths: Sequence[Strength], samples: int) -> None:
    if not UNITS[mode]:
        raise InputError(f"{mode} has no strength to vary; take a mode with one, such as add")
    if not strengths:
        raise InputError("no strengths were given; give some, such as 0.5xmax,1xmax,2xmax")
    if not prompts:
        raise InputError("no prompts were given; give at least one")
    if samples < 1:
        raise InputError(f"{samples} samples are none; take 1 or more")
    said = [str(s) for s in strengths]
    if twice := sorted({s for s in said if said.count(s) > 1}):
        raise InputError(f"the strength {twice[0]} was given twice; give each once")
    if several := [s for s in strengths if len(s.values) != 1]:
        raise InputError(f"{several[0]} are several strengths in one; give them one by one")


def _work(
    model: LanguageModel, strengths: Sequence[Strength], prompts: int, samples: int, length: int
) -> list[list[tuple[int, int]]]:
    """Batches of `(place, prompt)`, place 0 without an edit; each of one unit of strength."""
    vocabulary = model.hf.get_output_embeddings().weight.shape[0]
    size = max(1, min(_ROWS, _ENTRIES // (vocabulary * length)))
    kinds: dict[Unit | None, list[tuple[int, int]]] = {}
    for place in range(len(strengths) + 1):
        kind = strengths[place - 1].unit if place else None
        rows = [(place, prompt) for prompt in range(prompts) for _ in range(samples)]
        kinds.setdefault(kind, []).extend(rows)
    return [rows[k : k + size] for rows in kinds.values() for k in range(0, len(rows), size)]


def _points(
    strengths: Sequence[Strength], sums: Sequence[Sums], texts: Sequence[Sequence[str]],
    effect: str, seed: int,
) -> tuple[Point, ...]:  # fmt: skip
    """Figures with intervals, the unsteered ones first; all from the same resamples."""
    n = sums[0].n_prompts
    chosen = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
    made = []
    for place, own in enumerate(sums):
        found = {name: _measure(own.ratio(name), own.ratio(name, chosen), n) for name in MEASURES}
        change = None
        if place:
            more, again = (own.ratio(effect, at) - sums[0].ratio(effect, at)
                           for at in (None, chosen))  # fmt: skip
            change = _measure(more, again, n)
        made.append(
            Point(
                strength=strengths[place - 1] if place else None, measures=found, change=change,
                continuations=tuple(texts[place]),
            )
        )  # fmt: skip
    return tuple(made)


def _measure(value: Any, resampled: Any, prompts: int) -> Measure | None:
    if not np.isfinite(value):
        return None
    kept = resampled[np.isfinite(resampled)]
    if prompts < 2 or not len(kept):
        return Measure(float(value), None, None)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Measure(float(value), float(low), float(high))


def _knee(
    points: Sequence[Point], strengths: Sequence[Strength], maximum: float | None
) -> tuple[Strength | None, str]:
    """The knee, and a sentence that says why; the rule is the module's."""
    plain = points[0].measures
    if plain["perplexity"] is None:
        return None, "no knee: the unsteered model ends its text at once"
    known = sizes(strengths, maximum)
    order = range(len(strengths)) if known is None else np.argsort(np.abs(known), kind="stable")
    ways = [[k for k in order if known is None or known[k] >= 0],
            [k for k in order if known is not None and known[k] < 0]]  # fmt: skip
    found: list[tuple[float, int, bool]] = []
    for way in ways:
        fine = list(way)
        for i, k in enumerate(way):
            if not _readable(points[k + 1], points[0]):
                fine = way[:i]
                break
        told = [k for k in fine if _told(points[k + 1].change)]
        if told:
            change = points[told[-1] + 1].change
            found.append((abs(change.value if change else 0.0), told[-1], fine == way))
    if not found:
        if any(_readable(p, points[0]) for p in points[1:]):
            return None, "no knee: no strength at which the text still reads has a clear effect"
        return None, "no knee: the text comes apart at every strength; try weaker ones"
    _, knee, whole = max(found)
    change = points[knee + 1].change
    clear = "a clear effect" if change and change.low is not None else (
        "an effect (how clear a single prompt does not say)")  # fmt: skip
    if whole:
        return strengths[knee], (
            f"{strengths[knee]} is the strongest with {clear}, and no strength on the way costs "
            "too much: the knee may lie beyond; try stronger ones"
        )
    return strengths[knee], (
        f"{strengths[knee]} is the strongest with {clear} before perplexity is more than "
        f"{MOST_PERPLEXITY:g} times the unsteered, or {MOST_REPETITION:.0%} more of the text "
        "repeats itself"
    )


def _readable(point: Point, plain: Point) -> bool:
    """Whether the text at a strength still reads as the unsteered one does."""
    steered, own = point.measures, plain.measures
    perplexity, before = steered["perplexity"], own["perplexity"]
    if perplexity is None or before is None:
        return False
    again, known = (m["repetition"].value if m["repetition"] else 0.0 for m in (steered, own))
    return perplexity.value <= MOST_PERPLEXITY * before.value and again <= known + MOST_REPETITION


def _told(change: Measure | None) -> bool:
    """Whether a change is told from none: its interval leaves 0 out."""
    if change is None:
        return False
    if change.low is None or change.high is None:
        return change.value != 0
    return change.low > 0 or change.high < 0
