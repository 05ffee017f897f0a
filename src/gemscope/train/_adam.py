"""Adam in one pass: projection, clipping, moments, update and unit rows, while rows are in cache.

The gradient of a matrix is made a few rows at a time and used at once, so that it never exists
whole: per parameter, a step reads and writes the weight and its second moment and nothing else.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import triton_runs

from ._config import Optimizer

_CHUNK = 2**18
"""Parameters of a chunk: with its moments, what a core's cache holds."""


def rate(o: Optimizer, step: int, steps: int) -> float:
    """Learning rate of the step after `step` others: warm-up, constant, decay."""
    if step < o.warm_up:
        share = (1 - math.cos(math.pi * step / o.warm_up)) / 2
        return o.lr * (0.1 + 0.9 * share)
    left = (steps - step) / steps
    return o.lr * (min(1.0, left / o.decay) if o.decay else 1.0)


class Adam:
    """Second moments, and first ones where `beta1` is not 0, of named parameters."""

    def __init__(self, config: Optimizer, parameters: dict[str, Tensor]):
        self.config, self.step = config, 0
        self.second = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.first = {n: torch.zeros_like(p) for n, p in parameters.items() if config.beta1}
        self._done: dict[torch.device, Tensor] = {}

    def begin(self, lr: float) -> None:
        """Begin a step at rate `lr`."""
        self.step += 1
        self._lr = lr
        self._done = {p.device: torch.tensor(float(self.step), device=p.device)
                      for p in self.second.values()}  # fmt: skip

    def whole(
        self,
        name: str,
        parameter: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        scale: float = 1.0,
    ) -> None:
        """Update a small parameter at `scale` times the rate."""
        self._update(name, slice(None), parameter, gradient, scale)

    def rows(
        self,
        name: str,
        parameter: Float[Tensor, "n_rows d"],
        first: int,
        gradient: Callable[[int, int], Tensor],
        stop: int,
        *,
        unit: bool,
    ) -> None:
        """Update rows `first` to `stop` of a matrix; `gradient(a, b)` is that of rows
        `first + a` to `first + b`. Unit rows stay so: what would only lengthen them is left out.
        """
        for start, end in chunks(stop - first, parameter):
            some = slice(first + start, first + end)
            rows, g = parameter[some], gradient(start, end)
            if self._fused(name, some, rows, g, unit=unit):
                continue
            if unit:
                remove_parallel(g, rows)
            self._update(name, some, rows, g, 1.0)
            if unit:
                rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(1e-12))

    def _fused(self, name: str, some: slice, rows: Tensor, g: Tensor, *, unit: bool) -> bool:
        """Do it in one kernel, where there is one."""
        if not triton_runs(rows.device):
            return False
        from ._triton import WIDEST, adam_rows  # imports Triton

        if rows.shape[1] > WIDEST:
            return False
        o = self.config
        first = self.first[name][some] if o.beta1 else None
        adam_rows(
            rows, g, self.second[name][some], first, unit=unit,
            lr=self._lr / (1 - o.beta1**self.step), root=1 / math.sqrt(1 - o.beta2**self.step),
            beta1=o.beta1, beta2=o.beta2, eps=o.eps,
        )  # fmt: skip
        return True

    def _update(self, name: str, some: slice, rows: Tensor, g: Tensor, scale: float) -> None:
        o = self.config
        # Where no first moment is kept, it is the gradient: any mean of the two is the same.
        first = self.first[name][some] if o.beta1 else g
        # What torch.optim.Adam(fused=True) calls: all of it in one pass over the rows.
        torch._fused_adam_(
            [rows], [g], [first], [self.second[name][some]], [], [self._done[g.device]],
            lr=self._lr * scale, beta1=o.beta1, beta2=o.beta2, weight_decay=0.0, eps=o.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip


def chunks(n_rows: int, like: Float[Tensor, "..."]) -> Iterator[tuple[int, int]]:
    """Runs of rows to go through `n_rows` in; all at once where caches are not the point."""
    step = n_rows if like.device.type != "cpu" else max(32, _CHUNK // like.shape[1])
    for start in range(0, n_rows, max(step, 1)):
        yield start, min(start + step, n_rows)


def remove_parallel(gradient: Float[Tensor, "n_rows d"], rows: Float[Tensor, "n_rows d"]) -> None:
    """Take out of `gradient`, in place, what only lengthens the unit vectors `rows`."""
    along = (gradient * rows).sum(1, keepdim=True)
    gradient.addcmul_(along, rows, value=-1)
