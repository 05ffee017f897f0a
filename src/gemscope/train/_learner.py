"""One artefact in training: its weights, its optimizer, its counters, and its step."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import SparseFeatures

from ._adam import Adam, rate
from ._auxk import AuxGradients, revive
from ._bank import Encoded, Member
from ._blocks import Block, DenseBlock, SparseBlock, Window
from ._config import Artefact
from ._penalties import penalties
from ._update import Part, update
from ._weights import Scales, Weights

_EMA, _LAST = 0.01, 10
"""Weight of a batch in the threshold that a `batch-topk` dictionary is used with; in a short run
more, so that it is that of the last tenth."""

Through = Callable[[Float[Tensor, "batch d_out"]], tuple[Float[Tensor, "batch d_out"], float]]
"""From reconstructions, normalised, to the gradient of the KL through the model, and the KL."""


@dataclass(slots=True)
class Measured:
    """What a step showed of its batch."""

    loss: float
    error: float
    """Mean squared length of what the reconstruction misses, normalised."""
    l0: float
    kl: float | None = None


@dataclass(slots=True)
class Clock:
    """Seconds by section."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[section] = self.seconds.get(section, 0.0) + spent


class Learner:
    """An artefact between its first step and its last."""

    def __init__(self, config: Artefact, weights: Weights, scales: Scales, steps: int):
        self.config, self.weights, self.scales, self.steps = config, weights, scales, steps
        self.adam = Adam(config.optimizer, weights.named())
        self.step, self.tokens = 0, 0
        self.silent = [torch.zeros(len(w), dtype=torch.int64, device=w.device)
                       for w in weights.w_enc]  # fmt: skip
        """Tokens since each feature fired."""
        self.density = 1.0
        """Share of entries in the support of the last step: what decides which way is faster."""
        self.aim = config.l0
        self.clock = Clock()

    @property
    def member_low(self) -> bool:
        """Whether the support begins at a threshold."""
        return self.config.activation in ("jumprelu", "relu")

    def members(self) -> list[Member]:
        """The encoders of its layers, for the next step."""
        w, c = self.weights, self.config
        out = []
        for i, rows in enumerate(w.w_enc):
            low = None
            if self.member_low:
                low = (w.threshold[i] - self._bandwidth / 2).clamp_min(0)
            out.append(
                Member(
                    rows,
                    w.bias(i),
                    low,
                    dense=self.density > _sparse_below(rows),
                    k=int(c.l0),
                    whole_batch=c.activation == "batch-topk",
                )
            )
        return out

    @property
    def _bandwidth(self) -> float:
        return self.config.sparsity.bandwidth if self.config.activation == "jumprelu" else 0.0

    def learn(
        self,
        xs: Sequence[Float[Tensor, "batch d_in"]],
        y: Float[Tensor, "batch d_all"],
        encoded: Sequence[Encoded],
        through: Through | None = None,
    ) -> Measured:
        """One step: inputs of its layers and targets, normalised, and what its encoders gave."""
        c, w = self.config, self.weights
        with self.clock("decode"):
            blocks = self._blocks(encoded)
            counts = torch.stack([b.counts for _, b in blocks]).sum(0)
            errors = self._errors(blocks, xs, y)
            asks, cost = penalties(c, [b for _, b in blocks], counts, step=self.step, aim=self.aim)
            gradients = self._gradients(errors)
            kl = None
            if through is not None and c.end_to_end is not None:
                kl = _add_kl(through, y, errors[-1], gradients[0], c.end_to_end.weight)
            parts = [
                Part(i, block, g, block.backward(g, self._rows(i, block), ask))
                for (i, block), g, ask in zip(
                    blocks, self._of_blocks(blocks, gradients), asks, strict=True
                )
            ]
            aux = self._aux(xs, errors[-1])
        missed = [float(torch.linalg.vector_norm(e)) ** 2 / len(e) for e in errors]
        l0 = float(counts.double().mean())
        with self.clock("optimizer"):
            lr = rate(c.optimizer, self.step, self.steps)
            update(c, w, self.adam, xs, parts, gradients[0], aux, lr=lr)
        self._count(blocks, encoded, l0)
        loss = sum(weight * m for (_, weight), m in zip(c.levels, missed, strict=True))
        loss += cost + (aux.loss if aux else 0.0)
        return Measured(loss=loss, error=missed[-1], l0=l0, kl=kl)

    def _blocks(self, encoded: Sequence[Encoded]) -> list[tuple[int, Block]]:
        """Runs of features that share their gradient, each with its layer."""
        w = self.weights
        out: list[tuple[int, Block]] = []
        bounds = [0, *(size for size, _ in self.config.levels)]
        for i, given in enumerate(encoded):
            edges = bounds if w.n_layers == 1 else [0, len(w.w_enc[i])]
            for first, stop in pairwise(edges):
                window = Window(w.threshold[i][first:stop], self._bandwidth)
                if isinstance(given, SparseFeatures):
                    some = given if len(edges) == 2 else _columns(given, first, stop)
                    jumps = self.config.activation == "jumprelu"
                    out.append((i, SparseBlock(some, first, window if jumps else None)))
                else:
                    out.append((i, DenseBlock(given[:, first:stop], first, window)))
        return out

    def _rows(self, layer: int, block: Block) -> Tensor:
        return self.weights.w_dec[layer][block.first : block.stop]

    def _errors(self, blocks: list[tuple[int, Block]], xs: Sequence[Tensor], y: Tensor) -> list:
        """What each reconstruction misses, the whole one last."""
        w = self.weights
        made = w.b_dec.expand_as(y).clone()
        for i, skip in enumerate(w.skip):
            made[:, i * w.d_out : (i + 1) * w.d_out] += xs[i] @ skip
        out = []
        for place, (i, block) in enumerate(blocks):
            made[:, i * w.d_out :] += block.decode(self._rows(i, block))
            if w.n_layers == 1 and place + 1 < len(blocks):
                out.append(made - y)
        return [*out, made.sub_(y)]

    def _gradients(self, errors: list[Tensor]) -> list[Tensor]:
        """Of each level's features: they take part in their own level and all later ones."""
        weights = [weight for _, weight in self.config.levels]
        out: list[Tensor] = []
        for error, weight in zip(reversed(errors), reversed(weights), strict=True):
            own = error * (2 * weight / len(error))
            out.insert(0, own if not out else own.add_(out[0]))
        return out

    def _of_blocks(self, blocks: list, gradients: list[Tensor]) -> list[Tensor]:
        w = self.weights
        if w.n_layers == 1:
            return gradients
        return [gradients[0][:, i * w.d_out :].contiguous() for i, _ in blocks]

    def _aux(self, xs: Sequence[Tensor], error: Tensor) -> AuxGradients | None:
        aux = self.config.auxk
        if aux is None:
            return None
        dead = (self.silent[0] >= aux.dead_after).nonzero().squeeze(1)
        if not len(dead):
            return None
        w = self.weights
        return revive(
            xs[0], w.centre(0), -error, w.w_enc[0], w.bias(0), w.w_dec[0], dead,
            k=aux.features, coefficient=aux.coefficient,
        )  # fmt: skip

    def _count(
        self, blocks: list[tuple[int, Block]], encoded: Sequence[Encoded], l0: float
    ) -> None:
        n = len(blocks[0][1].counts)
        for i, block in blocks:
            silent = self.silent[i][block.first : block.stop]
            silent += n
            silent[block.fired > 0] = 0
        self.step, self.tokens = self.step + 1, self.tokens + n
        size = n * sum(map(len, self.weights.w_enc))
        self.density = sum(block.support for _, block in blocks) / size
        c = self.config
        if c.sparsity.aim:
            self.aim += c.sparsity.aim * (c.l0 - l0)
            self.aim = min(max(self.aim, c.l0 / 2), 2 * c.l0)
        given = encoded[0]
        if c.activation == "batch-topk" and isinstance(given, SparseFeatures):
            self._follow(given.values)

    def _follow(self, chosen: Tensor) -> None:
        """Move the threshold of a `batch-topk` dictionary towards the smallest value chosen."""
        if not chosen.numel():
            return
        least, known = chosen.min(), self.weights.threshold[0]
        weight = min(1.0, max(_EMA, _LAST / self.steps))
        known.copy_(least if self.step == 1 else known.lerp(least.expand_as(known), weight))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        out = {f"parameter.{n}": p for n, p in self.weights.named().items()}
        out |= {f"second.{n}": p for n, p in self.adam.second.items()}
        out |= {f"first.{n}": p for n, p in self.adam.first.items()}
        return out | {f"silent.{i}": s for i, s in enumerate(self.silent)}

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint."""
        names = ("step", "tokens", "density", "aim")
        return {n: getattr(self, n) for n in names} | {
            "seconds": self.clock.seconds, "c_in": self.scales.c_in, "c_out": self.scales.c_out,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `state` gave."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.step, self.tokens = state["step"], state["tokens"]
        self.density, self.aim = state["density"], state["aim"]
        self.adam.step, self.clock.seconds = self.step, dict(state["seconds"])


def _add_kl(through: Through, y: Tensor, error: Tensor, g: Tensor, beta: float) -> float:
    """Turn `g`, in place, into the gradient of `(MSE + alpha beta KL) / (1 + beta)`; the KL."""
    slope, kl = through(error + y)
    alpha = float(error.square().sum(1).mean()) / (kl + 1e-8)
    g.add_(slope, alpha=alpha * beta).div_(1 + beta)
    return kl


def _columns(code: SparseFeatures, first: int, stop: int) -> SparseFeatures:
    """Features `first` to `stop`, numbered from 0."""
    mine = ((code.indices >= first) & (code.indices < stop)).nonzero().squeeze(1)
    return SparseFeatures.from_entries(
        code.rows[mine], code.indices[mine].long() - first, code.values[mine], code.n_tokens,
        stop - first,
    )  # fmt: skip


def _sparse_below(rows: Float[Tensor, "n_features d_in"]) -> float:
    """Share of entries in the support below which the sparse way is faster.

    Measured (`benchmarks/run.py switch`): where a batch's tables stay in the cache, entries cost
    little more than their products; where they do not, each is fetched from memory.
    """
    return 0.25 if rows.shape[1] <= 512 else 0.08
