"""Intervening: what a metric does when a target is patched, ablated or set.

The run is that of the clean prompt. `patch` puts in what the target holds in the run on the
corrupted prompt (activation patching; 2309.16042 compares its variants), `ablate` zero or a mean,
`set` a value. The effect is the metric afterwards less the clean one; its share is how far that is
on the way from the clean metric to the corrupted one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from gemscope.errors import InputError, did_you_mean
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel

from ._intervene_means import means
from ._intervene_places import Places, Prompt, aligned, masks
from ._intervene_view import Constant, Intervening, New, Patched, View
from ._metric import Measuring, Metric, rows_that_fit
from ._metric import metric as read_metric
from ._target import (
    FeatureTarget,
    Load,
    PartTarget,
    SiteTarget,
    Target,
    check_together,
    reads_of,
    sites_of,
    target,
)

Progress = Callable[[str, int, int], None]
"""Told `(what, done, total)`."""


class Do(StrEnum):
    """What is done to targets."""

    PATCH = "patch"
    ABLATE = "ablate"
    SET = "set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A metric after an intervention, and what that is beside the clean and the corrupted one."""

    after: float
    effect: float
    """The metric after it, less the clean one."""
    share: float | None
    """The effect as a share of corrupted less clean; None without a corrupted prompt, or where
    both have the same metric."""

    @classmethod
    def of(cls, effect: float, clean: float, corrupted: float | None) -> "Outcome":
        """The outcome of an `effect` beside the clean and the corrupted metric."""
        apart = None if corrupted is None else corrupted - clean
        return cls(after=clean + effect, effect=effect, share=effect / apart if apart else None)

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """What was done to a pass, and what became of the metric."""

    metric: Metric
    targets: tuple[Target, ...]
    do: Do
    value: float | None
    mean: str | None
    prompt: Prompt
    corrupted_prompt: Prompt | None
    at: int | None
    """Position of the metric in the clean prompt; None for one of the whole text."""
    positions: list[int]
    """Positions changed in the clean prompt."""
    opposite: list[int] | None
    """The same in the corrupted prompt, when patching."""
    activations: dict[str, tuple[list[float], list[float] | None]]
    """Of each feature among the targets, at `positions` of the clean prompt, and at `opposite`."""
    clean: float
    corrupted: float | None
    outcome: Outcome
    """With all the positions changed together."""
    each: list[Outcome] | None
    """With each of the positions changed by itself."""

    def json(self) -> dict[str, Any]:
        """All of it; tokens are listed with BOS first, whose position is 0."""
        other = self.corrupted_prompt
        rows = []
        for i, place in enumerate(self.positions):
            row: dict[str, Any] = {"position": place, "token": self.prompt.pieces[place]}
            if self.opposite is not None and other is not None:
                opposite = self.opposite[i]
                row |= {"corrupted_position": opposite, "corrupted_token": other.pieces[opposite]}
            if self.activations:
                row["activations"] = [self._activation(name, i) for name in self.activations]
            rows.append(row | (self.each[i].json() if self.each else {}))
        return {
            "metric": self.metric.text,
            "at": self.at,
            "do": str(self.do),
            "targets": [one.name for one in self.targets],
            "value": self.value,
            "mean": self.mean,
            "clean": {"text": self.prompt.text, "tokens": self.prompt.pieces, "metric": self.clean},
            "corrupted": None
            if other is None
            else {"text": other.text, "tokens": other.pieces, "metric": self.corrupted},
            **self.outcome.json(),
            "positions": rows,
        }

    def _activation(self, name: str, i: int) -> dict[str, Any]:
        clean, corrupted = self.activations[name]
        known = {"feature": name, "clean": clean[i]}
        return known if corrupted is None else known | {"corrupted": corrupted[i]}


@torch.no_grad()
def intervene(
    model: LanguageModel,
    clean: str,
    targets: Sequence[str | Target],
    *,
    do: str,
    metric: str | Metric,
    corrupted: str | None = None,
    value: float | None = None,
    mean: str | None = None,
    positions: str | Places | None = None,
    at: int | None = None,
    each: bool = False,
    load: Load = load_sae,
    progress: Progress | None = None,
) -> Intervention:
    """Change `targets` in the run of `model` on `clean`, and measure.

    Targets are written as `ADDRESS/INDEX`, `ADDRESS/all`, `ADDRESS/error`, `ADDRESS/bias`,
    `3.mlp_out` or `3.attn_heads/2`; what they hold is taken from the unedited stream of their site
    in the pass under way, and everything else at it stays. Several are changed together. `do` is
    `patch`, from the run on `corrupted`; `ablate`, to zero or to the `mean` over a text; or `set`,
    of features, to `value`. Positions are all ordinary tokens unless named. The metric is taken at
    the last position or `at` another. With `each`, every position is also changed by itself, in
    rows of a batch. `load` makes dictionaries of addresses.

    Raises:
        InputError: A target, metric or position that does not exist; prompts that do not fit
            together; an option that does not apply.
    """
    deed = _deed(do, corrupted, value, mean)
    load = once(load, model)
    chosen = _chosen(model, targets, deed, load)
    what = read_metric(metric, model, load, at=at, after=sites_of(chosen))
    prompt = Prompt.of(model, clean)
    other = None if corrupted is None else Prompt.of(model, corrupted)
    places = Places.parse(positions) if isinstance(positions, str) else positions or Places()
    where = places.among(prompt)
    _check_special(chosen, prompt, where)
    measuring = Measuring(model, what, prompt)
    read = reads_of(chosen)
    run, before = measuring.begin(read)
    base, there, opposite = None, None, None
    new: New = Constant(value or 0.0)
    if other is not None:
        other_run, base = measuring.beside(other, read)
        if deed is Do.PATCH:
            across, there = aligned(places, prompt, other), View.of(other_run)
            new, opposite = Patched(there, across), across[where].tolist()
    if mean is not None:
        new = means(model, chosen, mean, progress=progress)
    (together,) = _outcomes(measuring, chosen, new, [where], before, base, None)
    rows = [[place] for place in where] if each else []
    single = _outcomes(measuring, chosen, new, rows, before, base, progress)
    return Intervention(
        metric=what, targets=chosen, do=deed, value=value, mean=mean, prompt=prompt,
        corrupted_prompt=other, at=measuring.at, positions=where, opposite=opposite,
        activations=_activations(chosen, View.of(run), where, there, opposite), clean=before,
        corrupted=base, outcome=together, each=single if each else None,
    )  # fmt: skip


def _chosen(
    model: LanguageModel, targets: Sequence[str | Target], deed: Do, load: Load
) -> tuple[Target, ...]:
    """The targets, if they exist and what is to be done to them can be done together."""
    chosen = tuple(target(t, model, load) if isinstance(t, str) else t for t in targets)
    for one in chosen:
        _check_fits(one, model)
    check_together(chosen)
    if deed is Do.SET and (wrong := [t for t in chosen if not isinstance(t, FeatureTarget)]):
        raise InputError(f"set gives features a value, and {wrong[0].name} is none: name features")
    return chosen


def _activations(
    targets: tuple[Target, ...], here: View, where: list[int], there: View | None,
    opposite: list[int] | None,
) -> dict[str, tuple[list[float], list[float] | None]]:  # fmt: skip
    """Of each feature: activations at `where`, and in the other run at `opposite`."""
    return {
        one.name: (
            here.feature(one.feature)[where].tolist(),
            None
            if there is None or opposite is None
            else there.feature(one.feature)[opposite].tolist(),
        )
        for one in targets
        if isinstance(one, FeatureTarget)
    }


def _outcomes(
    measuring: Measuring,
    targets: tuple[Target, ...],
    new: New,
    rows: list[list[int]],
    before: float,
    base: float | None,
    progress: Progress | None,
) -> list[Outcome]:
    """What changing targets at the positions of each of `rows` does to the metric."""
    length = len(measuring.clean)
    found: list[float] = []
    step = rows_that_fit(measuring.model, length)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        where = masks([*some, []] if len(some) > 1 else some, length)
        found += measuring.effects(len(some), Intervening(targets, new, where), before)
        if progress is not None:
            progress("positions", len(found), len(rows))
    return [Outcome.of(effect, before, base) for effect in found]


def _deed(do: str, corrupted: str | None, value: float | None, mean: str | None) -> Do:
    if do not in list(Do):
        raise InputError(f"nothing is called {do!r} to do; {did_you_mean(do, Do)}")
    deed = Do(do)
    if deed is Do.PATCH and corrupted is None:
        raise InputError("patch takes values from another run: give its prompt with --corrupted")
    if deed is Do.SET and value is None:
        raise InputError("set needs the value that features are to have: give --value")
    if deed is not Do.SET and value is not None:
        raise InputError(f"a value is for set; {deed} takes none")
    if deed is not Do.ABLATE and mean is not None:
        raise InputError(f"a mean is for ablate; {deed} takes none")
    if value is not None and not abs(value) < float("inf"):
        raise InputError(f"a feature cannot be set to {value}: give a finite number")
    return deed


def once(load: Load, model: LanguageModel) -> Load:
    """`load` that loads each dictionary once, to where the model is."""
    known: dict[str, Any] = {}

    def one(address: str) -> Any:
        if address not in known:
            known[address] = load(address).to(model.device)
        return known[address]

    return one


def _check_fits(one: Target, model: LanguageModel) -> None:
    match one:
        case SiteTarget():
            model.width(one.site)
        case PartTarget():
            model.check(one.sae)
        case FeatureTarget():
            model.check(one.feature.sae)


def _check_special(targets: tuple[Target, ...], prompt: Prompt, where: list[int]) -> None:
    """Refuse dictionaries at tokens that none was trained on."""
    special = [p for p in where if not prompt.ordinary[p]]
    of = [t for t in targets if not isinstance(t, SiteTarget)]
    if special and of:
        raise InputError(
            f"position {special[0]} holds the special token {prompt.shown(special[0])}, which no "
            f"dictionary was made for: name ordinary tokens, or a whole site, not {of[0].name}"
        )
