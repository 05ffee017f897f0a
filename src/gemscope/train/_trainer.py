"""The reference trainer: dense, plain, one dictionary at a time.

One step: forward, loss, backward, gradient of the decoder freed of its component along the rows,
Adam, decoder rows back to unit norm, thresholds kept positive. The published recipe is
2408.05147, the penalty that of Gemma Scope 2. It is written to be read and to be measured
against; it pays for every product in full.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from gemscope.activations import ActivationBatch, ActivationStream, Position
from gemscope.errors import InputError

from ._checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from ._config import TrainConfig
from ._dictionary import (
    Dictionary,
    Scales,
    align,
    frequency_penalty,
    initial,
    l0_penalty,
    measured_thresholds,
    remove_parallel,
)

_SMALLEST_THRESHOLD = 1e-6
_LOOK_BACK = 2_000_000
"""A feature that has not fired for so many tokens counts as dead in the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run stands after a step."""

    step: int
    steps: int
    tokens: int
    loss: float
    fvu: float
    l0: float
    dead: float
    """Share of features that have not fired lately."""
    seconds: float


class Trainer:
    """A run: its parameters, its optimizer, its place in the data."""

    def __init__(self, config: TrainConfig, stream: ActivationStream):
        self.config, self.stream = config, stream
        self.step, self.position, self.seconds = 0, Position(), 0.0
        x, y = stream.first_bucket()
        self.scales = Scales(_norm(x), _norm(y))
        self.dictionary = _first_dictionary(config, x / self.scales.c_in, y / self.scales.c_out)
        for value in self.dictionary.parameters().values():
            value.requires_grad_()
        self.variance = float((y / self.scales.c_out).var(0, correction=0).sum())
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=x.device)
        names = list(self.dictionary.parameters())
        slow = [v for n, v in self.dictionary.parameters().items() if n != "threshold"]
        self.names = [n for n in names if n != "threshold"] + ["threshold"]
        self.optimizer = torch.optim.Adam(
            [{"params": slow}, {"params": [self.dictionary.threshold]}],
            betas=(0.0, 0.999),
            eps=1e-8,
        )

    def train(
        self,
        folder: Path,
        *,
        report: Callable[[Progress], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Run to the end, or until `stopping` says so; whether the end was reached.

        Checkpoints go to `folder` as they fall due, and one more when stopped.
        """
        began = time.monotonic() - self.seconds
        for batch in self.stream.batches(self.position):
            if self.step >= self.config.steps:
                break
            progress = self.advance(batch)
            self.seconds = time.monotonic() - began
            if not math.isfinite(progress.loss):
                self._diverged(f"its loss is {progress.loss}")
            report(progress)
            last = stopping()
            if last or self.step % self.config.checkpoint_every == 0:
                self.save(folder, progress)
            if last:
                break
        return self.step >= self.config.steps

    def _diverged(self, how: str) -> NoReturn:
        raise InputError(
            f"{self.config.out} diverged: {how} at step {self.step}; lower optimizer.lr or "
            "sparsity.coefficient in a new run; the last checkpoint stays as it was"
        )

    def advance(self, batch: ActivationBatch) -> Progress:
        """One step on one batch."""
        x, y = batch.x / self.scales.c_in, batch.y / self.scales.c_out
        for group, multiple in zip(
            self.optimizer.param_groups, (1.0, self.config.optimizer.threshold_lr), strict=True
        ):
            group["lr"] = self._rate() * multiple
        self.optimizer.zero_grad()
        error, l0, active = self._losses(x, y)
        d = self.dictionary
        if d.w_dec.grad is not None:
            remove_parallel(d.w_dec.grad, d.w_dec.detach())
        self.optimizer.step()
        with torch.no_grad():
            d.w_dec.copy_(F.normalize(d.w_dec, dim=1))
            d.threshold.clamp_(min=_SMALLEST_THRESHOLD)
        self.step, self.position = self.step + 1, batch.after
        self.last_fired[active.any(0)] = self.step
        return self._progress(error, l0)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sparsity = self.config.sparsity
        out = self.dictionary(x, sparsity.bandwidth)
        error = (out.y - y).square().sum(1).mean()
        warm = min(1.0, (self.step + 1) / max(sparsity.warm_up, 1))
        cost = sparsity.coefficient * l0_penalty(out.active, sparsity.l0)
        if sparsity.frequency:
            cost = cost + sparsity.frequency * frequency_penalty(
                out.active, sparsity.frequency_scale
            )
        (error + warm * cost).backward()
        active = out.active.detach()
        return error.detach(), active.sum(1).mean(), active

    def _rate(self) -> float:
        o, steps = self.config.optimizer, self.config.steps
        if self.step < o.warm_up:
            share = (1 - math.cos(math.pi * self.step / o.warm_up)) / 2
            return o.lr * (0.1 + 0.9 * share)
        left = (steps - self.step) / steps
        return o.lr * (min(1.0, left / o.decay) if o.decay else 1.0)

    def _progress(self, error: Tensor, l0: Tensor) -> Progress:
        horizon = max(1, _LOOK_BACK // self.config.data.batch)
        dead = (self.last_fired < self.step - horizon).float().mean().item()
        return Progress(
            step=self.step,
            steps=self.config.steps,
            tokens=self.step * self.config.data.batch,
            loss=error.item(),
            fvu=error.item() / self.variance,
            l0=l0.item(),
            dead=dead,
            seconds=self.seconds,
        )

    def save(self, folder: Path, progress: Progress) -> None:
        """Write the checkpoint, and a line of metrics."""
        tensors = {f"parameter.{n}": v for n, v in self.dictionary.parameters().items()}
        if bad := [n for n, v in tensors.items() if not v.isfinite().all()]:
            self._diverged(f"{bad[0]} is not finite")
        tensors |= optimizer_tensors(self.optimizer, self.names)
        tensors["last_fired"] = self.last_fired
        state = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "bucket": self.position.bucket,
            "batch": self.position.batch,
            "seconds": self.seconds,
        }
        save_checkpoint(folder / CHECKPOINT, tensors, state)
        line = {n: getattr(progress, n) for n in Progress.__slots__}
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def restore(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, which must be of the same config."""
        tensors, state = load_checkpoint(folder / CHECKPOINT)
        if differing := _differences(state["config"], self.config.model_dump(mode="json")):
            raise InputError(
                f"{folder} holds a run of another config: {'; '.join(differing)}; "
                "restore those values, or choose another out"
            )
        with torch.no_grad():
            for name, value in self.dictionary.parameters().items():
                value.copy_(tensors[f"parameter.{name}"])
        restore_optimizer(self.optimizer, self.names, tensors)
        self.last_fired.copy_(tensors["last_fired"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.position = Position(state["bucket"], state["batch"])


CHECKPOINT = "checkpoint.safetensors"


def _norm(x: Tensor) -> float:
    return float(x.double().square().sum(1).mean().sqrt())


def _first_dictionary(config: TrainConfig, x: Tensor, y: Tensor) -> Dictionary:
    first = initial(
        x.shape[1],
        config.d_sae,
        y.shape[1],
        transcoder=config.reads != config.writes,
        affine=config.affine,
        centre=y.mean(0).cpu(),
        threshold=config.sparsity.threshold or 0.0,
        generator=torch.Generator().manual_seed(config.seed),
    ).to(x.device)
    if config.sparsity.start_l0 is not None:
        sample = x[: max(config.data.batch, 4_096)]
        first.threshold.copy_(measured_thresholds(first, sample, config.sparsity.start_l0))
        if not first.pre_bias:
            align(first, sample, y[: len(sample)])
    return first


def _differences(before: dict, now: dict, at: str = "") -> list[str]:
    out = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{at}{key}.")
        elif a != b:
            out.append(f"{at}{key} was {a}, is {b}")
    return out
