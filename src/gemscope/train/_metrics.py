"""What a run measures of its artefacts on the way: means over some steps, a line of JSON each."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ._config import TrainConfig
from ._learner import Learner, Measured

EVALUATIONS = "evaluations.jsonl"
"""What was measured on held-out text, a line of JSON each."""
_LINES = 400
"""Lines of metrics of a run, about."""
_HORIZON = 10_000_000
"""Tokens without firing after which a feature counts as dead; a fortieth of a shorter run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an artefact stands: means over the last steps, and the share of dead features."""

    name: str
    step: int
    tokens: int
    loss: float
    fvu: float
    l0: float
    target: float
    dead: float
    kl: float | None = None


class Metrics:
    """Sums since the last line, of every artefact."""

    def __init__(self, config: TrainConfig, learners: Sequence[Learner], variances: list[float]):
        self.learners, self.variances = learners, variances
        self.every = max(1, config.steps // _LINES)
        self.horizon = min(_HORIZON, max(config.data.tokens // 40, config.data.batch))
        self._sums = [_zeros() for _ in learners]
        self._last: list[Standing] = []

    def add(self, step: int, measured: Sequence[Measured], folder: Path) -> None:
        """Count a step; a line goes to each artefact's file in `folder` when one is due."""
        for sums, m in zip(self._sums, measured, strict=True):
            sums["steps"] += 1
            sums["loss"] += m.loss
            sums["error"] += m.error
            sums["l0"] += m.l0
            sums["kl"] += m.kl or 0.0
        if step % self.every == 0:
            self._last = [self._standing(p) for p in range(len(self.learners))]
            for standing in self._last:
                file = metrics_file(folder, standing.name)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(asdict(standing)) + "\n")
            self._sums = [_zeros() for _ in self.learners]

    def standings(self) -> tuple[Standing, ...]:
        """How each artefact stands."""
        if self._sums and self._sums[0]["steps"]:
            return tuple(self._standing(p) for p in range(len(self.learners)))
        return tuple(self._last)

    def _standing(self, place: int) -> Standing:
        learner, sums = self.learners[place], self._sums[place]
        steps = max(sums["steps"], 1)
        silent = sum(int((s >= self.horizon).sum()) for s in learner.silent)
        return Standing(
            name=learner.config.name,
            step=learner.step,
            tokens=learner.tokens,
            loss=sums["loss"] / steps,
            fvu=sums["error"] / steps / self.variances[place],
            l0=sums["l0"] / steps,
            target=learner.config.l0,
            dead=silent / learner.config.d_sae,
            kl=sums["kl"] / steps if learner.config.end_to_end else None,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"sums": self._sums, "last": [asdict(s) for s in self._last]}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from `state`; lines written after it are taken back."""
        self._sums = [dict(s) for s in state["sums"]]
        self._last = [Standing(**s) for s in state["last"]]
        for learner in self.learners:
            _take_back(metrics_file(folder, learner.config.name), learner.step)
        _take_back(folder / EVALUATIONS, self.learners[0].step)


def clear(folder: Path) -> None:
    """Remove all lines of a run."""
    shutil.rmtree(folder / "metrics", ignore_errors=True)
    (folder / EVALUATIONS).unlink(missing_ok=True)


def _take_back(file: Path, step: int) -> None:
    """Leave only lines of steps up to `step`."""
    if not file.is_file():
        return
    lines = file.read_text("utf-8").splitlines(keepends=True)
    part = file.with_suffix(".part")
    part.write_text("".join(line for line in lines if _step_of(line) <= step), "utf-8")
    part.replace(file)


def metrics_file(folder: Path, name: str) -> Path:
    """Where the metrics of the artefact `name` are, a line of JSON for every few steps."""
    return folder / "metrics" / f"{name}.jsonl"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by the end of a process: taken back


def _zeros() -> dict[str, float]:
    return dict.fromkeys(("steps", "loss", "error", "l0", "kl"), 0.0)
