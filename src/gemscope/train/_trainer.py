"""The loop: one source of activations, any number of artefacts, checkpoints on the way.

Every batch goes to all artefacts in turn. Those that read one site alone share that site's encoder
product; in everything else an artefact is by itself, and comes out as if trained alone.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gemscope.activations import ActivationBatch, Position, Source
from gemscope.errors import InputError
from gemscope.formats import Part
from gemscope.sites import Site, each

from ._bank import Bank, Encoded, encode
from ._checkpoint import Checkpoints
from ._config import Artefact, TrainConfig
from ._learner import Learner, Measured, Through
from ._metrics import Metrics, Standing
from ._weights import (
    Scales,
    Weights,
    align,
    drawn,
    fit_skips,
    measure_thresholds,
    unfolded,
)
from ._workers import Workers

_SPENT = ("encode", "decode", "optimizer")
_SAMPLE = 16_384
"""Tokens that scales, means and first thresholds are measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run stands after a step."""

    step: int
    steps: int
    tokens: int
    seconds: float
    sections: Mapping[str, float]
    """Seconds spent so far in data, model, encode, decode and optimizer."""
    standings: tuple[Standing, ...]
    """Of each artefact."""


class Trainer:
    """A run: its artefacts and its place in the data."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        starts: Mapping[str, Sequence[Part]] | None = None,
    ):
        self.config, self.source = config, source
        self.step, self.position, self.seconds = 0, Position(), 0.0
        self.sections = dict.fromkeys(("data", "model", "encode", "decode", "optimizer"), 0.0)
        sample = source.sample(_SAMPLE)
        self.learners: list[Learner] = []
        variances = []
        for artefact in config.artefacts:
            learner, variance = _learner(artefact, sample, config.steps, (starts or {}))
            self.learners.append(learner)
            variances.append(variance)
        del sample
        self._banks = _banks(self.learners)
        self._rows = _share(self._banks, self.learners)
        self._workers = Workers()
        self.metrics = Metrics(config, self.learners, variances)

    def train(
        self,
        folder: Path,
        *,
        report: Callable[[Progress], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        look: Callable[[int], None] = lambda _: None,
    ) -> bool:
        """Run to the end, or until `stopping` says so; whether the end was reached.

        Checkpoints go to `folder` as they fall due, and one more when stopped. `look` is called
        after every step, with its number.
        """
        began = time.monotonic() - self.seconds
        saved = self.step
        if self.step < self.config.steps:
            batches = self.source.batches(self.position, stopping)
            while self.step < self.config.steps:
                asked, model = time.monotonic(), self.source.model_seconds
                batch = next(batches, None)
                model = self.source.model_seconds - model
                self.sections["model"] += model
                self.sections["data"] += time.monotonic() - asked - model
                if batch is None:  # stopped, or there is no more
                    break
                measured = self.advance(batch)
                self.seconds = time.monotonic() - began
                self.metrics.add(self.step, measured, folder)
                report(self.progress())
                if stopping():
                    break
                look(self.step)
                if self.step % self.config.checkpoint_every == 0:
                    self.save(folder)
                    saved = self.step
        if saved != self.step:  # at the end too: what is left to do may be interrupted
            self.save(folder)
        return self.step >= self.config.steps

    @torch.no_grad()
    def advance(self, batch: ActivationBatch) -> list[Measured]:
        """One step of every artefact on one batch."""
        given = _Scaled(batch)
        began = {n: sum(x.clock.seconds.get(n, 0.0) for x in self.learners) for n in _SPENT}
        start = time.perf_counter()
        out: dict[int, Measured] = {}

        def go(places: list[int]) -> None:
            some = [self.learners[p] for p in places]
            for place, codes in zip(places, self._encode(some, given), strict=True):
                out[place] = self._learn(place, given, codes)

        if hasattr(batch, "through"):
            for places in self._banks:
                go(places)
        else:
            self._workers.each(go, self._banks)
        for learner, measured in ((self.learners[p], m) for p, m in sorted(out.items())):
            if not math.isfinite(measured.loss):
                self._diverged(learner, f"its loss is {measured.loss}")
        self._share_out(time.perf_counter() - start, began)
        self.step, self.position = self.step + 1, batch.after
        return [out[place] for place in range(len(self.learners))]

    def _learn(self, place: int, given: "_Scaled", codes: list[Encoded]) -> Measured:
        learner = self.learners[place]
        a, scales = learner.config, learner.scales
        xs = [given(s, c) for s, c in zip(each(a.reads), scales.c_in, strict=True)]
        ys = [given(s, c) for s, c in zip(each(a.writes), scales.c_out, strict=True)]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
        return learner.learn(xs, y, codes, self._through(given.batch, learner))

    def _share_out(self, seconds: float, before: Mapping[str, float]) -> None:
        """Give the sections of a step their shares of its `seconds`: workers overlap."""
        spent = {
            n: sum(x.clock.seconds.get(n, 0.0) for x in self.learners) - before[n] for n in _SPENT
        }
        whole = sum(spent.values()) or 1.0
        for name, value in spent.items():
            self.sections[name] += seconds * value / whole

    def _encode(self, learners: list[Learner], given: "_Scaled") -> list[list[Encoded]]:
        first = learners[0]
        with first.clock("encode"):
            members = [x.members() for x in learners]
            inputs = zip(each(first.config.reads), first.scales.c_in, strict=True)
            xs = [given(site, c) for site, c in inputs]
            if len(learners) == 1:
                return [[encode(x, m.w_enc, [m])[0] for x, m in zip(xs, members[0], strict=True)]]
            rows = self._rows[id(first)]
            return [[code] for code in encode(xs[0], rows, [m[0] for m in members])]

    @staticmethod
    def _through(batch: ActivationBatch, learner: Learner) -> Through | None:
        through = getattr(batch, "through", None)
        return None if through is None else through(learner.scales.c_out[0])

    def _diverged(self, learner: Learner, how: str) -> NoReturn:
        raise InputError(
            f"{learner.config.name} diverged: {how} at step {self.step + 1}; lower its "
            "optimizer.lr or sparsity.coefficient in a new run; the last checkpoint stays as it was"
        )

    def progress(self) -> Progress:
        """How it stands."""
        return Progress(
            step=self.step,
            steps=self.config.steps,
            tokens=self.step * self.config.data.batch,
            seconds=self.seconds,
            sections=dict(self.sections),
            standings=self.metrics.standings(),
        )

    def save(self, folder: Path) -> None:
        """Write the checkpoint; the one before it goes when it is there whole."""
        for learner in self.learners:
            for name, value in learner.weights.named().items():
                if not value.isfinite().all():
                    self._diverged(learner, f"{name} is not finite")
        state: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "round": self.position.round,
            "batch": self.position.batch,
            "seconds": self.seconds,
            "sections": self.sections,
            "metrics": self.metrics.state(),
            "artefacts": [x.state() for x in self.learners],
        }
        Checkpoints(folder).save(self.step, [x.tensors() for x in self.learners], state)

    def restore(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, which must be of the same config."""
        state, tensors = Checkpoints(folder).load()
        if differing := _differences(state["config"], self.config.model_dump(mode="json")):
            raise InputError(
                f"{folder} holds a run of another config: {'; '.join(differing)}; "
                "restore those values, or choose another out"
            )
        for learner, held, told in zip(self.learners, tensors, state["artefacts"], strict=True):
            learner.restore(held, told)
        self.step, self.seconds = state["step"], state["seconds"]
        self.sections = dict(state["sections"])
        self.position = Position(state["round"], state["batch"])
        self.metrics.restore(state["metrics"], folder)


class _Scaled:
    """A batch over the scales of artefacts, each site and scale computed once."""

    def __init__(self, batch: ActivationBatch):
        self.batch = batch
        self._known: dict[tuple[Site, float], Tensor] = {}

    def __call__(self, site: Site, scale: float) -> Tensor:
        key = site, scale
        if key not in self._known:
            self._known[key] = self.batch.values[site].float() / scale
        return self._known[key]


def _banks(learners: Sequence[Learner]) -> list[list[int]]:
    """Places of artefacts that share an encoder product: those of one input, alike in kind."""

    def key(place: int) -> tuple:
        x = learners[place]
        if x.weights.n_layers > 1:
            return ("alone", place, 0.0, 0)
        return ("shared", 0, x.scales.c_in[0], str(x.config.reads))

    places = sorted(range(len(learners)), key=lambda p: (str(key(p)), p))
    return [list(some) for _, some in groupby(places, key=key)]


def _share(banks: list[list[int]], learners: Sequence[Learner]) -> dict[int, Tensor]:
    out = {}
    for places in banks:
        if len(places) > 1:
            bank = Bank([learners[p].weights.w_enc[0] for p in places])
            for p, view in zip(places, bank.views, strict=True):
                learners[p].weights.w_enc[0] = view
            out[id(learners[places[0]])] = bank.rows
    return out


def _learner(
    a: Artefact,
    sample: Mapping[Site, Tensor],
    steps: int,
    starts: Mapping[str, Sequence[Part]],
) -> tuple[Learner, float]:
    """The artefact before its first step, and the variance of its normalised target."""
    xs, ys = [sample[s] for s in each(a.reads)], [sample[s] for s in each(a.writes)]
    scales = Scales(tuple(map(_norm, xs)), tuple(map(_norm, ys)))
    xs = [x / c for x, c in zip(xs, scales.c_in, strict=True)]
    y = torch.cat([y / c for y, c in zip(ys, scales.c_out, strict=True)], dim=1)
    variance = float(y.double().var(0, correction=0).sum())
    with torch.no_grad():
        if a.name in starts:
            weights = unfolded(starts[a.name], scales, pre_bias=a.reads == a.writes)
            return Learner(a, weights, scales, steps), variance
        return Learner(a, _first_weights(a, xs, y), scales, steps), variance


def _first_weights(a: Artefact, xs: list[Tensor], y: Tensor) -> Weights:
    n = len(xs)
    drawn_here = drawn(
        xs[0].shape[1],
        y.shape[1] // n,
        [a.d_sae // n] * n,
        sae=a.reads == a.writes,
        affine=a.affine,
        centre=y.mean(0).cpu(),
        threshold=a.sparsity.threshold or 0.0 if a.activation == "jumprelu" else 0.0,
        generator=torch.Generator().manual_seed(a.seed),
    )
    # Drawn on the processor, it is the same everywhere.
    weights = drawn_here.to(y.device)
    some = [x[:4_096] for x in xs]
    if a.activation == "jumprelu" and a.sparsity.start_l0 is not None:
        measure_thresholds(weights, some, a.sparsity.start_l0)
        fit_skips(weights, xs, y)
        if a.kind != "sae":
            align(weights, some, y[:4_096])
    return weights


def _norm(x: Tensor) -> float:
    return float(x.double().square().sum(1).mean().sqrt())


_OF_THE_PLACE = ("out", "checkpoint_every", "evaluate", "log")
"""Keys that may change between a run and its continuation."""


def _differences(before: dict, now: dict) -> list[str]:
    out: list[str] = []
    was, names = before.get("artefacts", []), [a["name"] for a in now["artefacts"]]
    if [a["name"] for a in was] != names:
        return [f"artefacts were {len(was)}, are {len(names)} or others"]
    for a, b in zip(was, now["artefacts"], strict=True):
        out += _different(a, b, f"{b['name']}: ")
    plain = {*_OF_THE_PLACE, "artefacts"}
    old, new = ({k: v for k, v in c.items() if k not in plain} for c in (before, now))
    # How often the data may be gone through says when to end, and nothing of what was done.
    for c in (old, new):
        c["data"] = {k: v for k, v in c["data"].items() if k != "epochs"}
    return _different(old, new, "") + out


def _different(before: dict, now: dict, at: str) -> list[str]:
    out = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _different(a, b, f"{at}{key}.")
        elif a != b:
            out.append(f"{at}{key} was {a}, is {b}")
    return out
