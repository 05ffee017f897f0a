"""Faithfulness and completeness of circuits of growing size, beside random ones (2403.19647).

With `m(C)` the metric when all but the circuit `C` is ablated, faithfulness is
`(m(C) - m(nothing)) / (m(everything) - m(nothing))`, and completeness the same of all nodes that
are not in `C`: near 1 and near 0 for a circuit that does the task and is all that does it.
Numerator and denominator are means over the prompts. Nodes are those that change between the clean
run and the ablated one of some example; a feature that is silent in both but fires once some others
are ablated is in no circuit, and none's complement either. So with all nodes in it a circuit is the
whole model on the prompts it was found on, and with none it is nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.errors import InputError

from ._sparse_case import Case
from ._sparse_run import EVERYTHING, NOTHING, Members, metrics_of
from ._sparse_space import Space

_RESAMPLES = 2000
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure and an interval of 95%, where there is one."""

    value: float
    low: float | None
    high: float | None

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The circuit of the `size` nodes with the largest effects, and random ones of that size."""

    size: int
    faithfulness: Spread
    """Over prompts: resampled, if there are two or more."""
    completeness: Spread
    random_faithfulness: Spread
    """Mean of the random circuits, and the interval that 95% of them lie in."""
    random_completeness: Spread

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "size": self.size, "faithfulness": self.faithfulness.json(),
            "completeness": self.completeness.json(),
            "random": {"faithfulness": self.random_faithfulness.json(),
                       "completeness": self.random_completeness.json()},
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """How well circuits stand for the model."""

    points: tuple[CurvePoint, ...]
    """By ascending size, from 0 to all nodes."""
    whole: float
    """Mean of the metric over the prompts, with nothing ablated."""
    empty: float
    """The same with everything ablated."""
    random_circuits: int
    prompts: int
    held_out: bool
    """Whether the prompts are others than those the circuit was found on."""

    def at(self, size: int) -> CurvePoint:
        """The point of a size."""
        return next(point for point in self.points if point.size == size)

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "points": [point.json() for point in self.points],
            "metric": {"everything": self.whole, "nothing": self.empty},
            "random_circuits": self.random_circuits, "prompts": self.prompts,
            "measured_on": "held_out" if self.held_out else "examples",
        }  # fmt: skip


def circuits_of(
    order: Int[Tensor, " n"], sizes: Sequence[int], count: int, seed: int
) -> list[Members]:
    """For each size its circuit and all other nodes, then `count` random pairs of these.

    `order` are all nodes, those with the largest effects first.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Members] = []
    for size in sizes:
        drawn = (order[torch.randperm(len(order), generator=generator)[:size]]
                 for _ in range(count))  # fmt: skip
        for keys in (order[:size], *drawn):
            left = order[~torch.isin(order, keys)]
            found += [(keys, False), (left, False)]
    return found


def ends_of(case: Case, space: Space) -> tuple[float, float]:
    """The metric with nothing ablated, and with everything."""
    whole, empty = metrics_of(case, space, [EVERYTHING, NOTHING])
    return whole, empty


def check_ends(ends: Float[Tensor, "n two"]) -> None:
    """Refuse a metric that ablating everything leaves as it is: a share of nothing is no number."""
    whole, empty = ends.mean(0).tolist()
    if abs(whole - empty) <= 1e-5 * max(1.0, abs(whole)):
        raise InputError(
            f"the metric is {whole:.4g} on the whole model and {empty:.4g} with every node "
            "ablated: nothing depends on these dictionaries' sites; take other dictionaries, "
            "prompts that differ more, or another metric"
        )


def sizes_of(count: int, wanted: Sequence[int] | None, kept: int) -> tuple[int, ...]:
    """Sizes of circuits among `count` nodes: those wanted that there are, 0, the kept and all."""
    steps = [s * 10**power for power in range(len(str(count))) for s in _STEPS]
    return tuple(sorted({0, count, kept, *(s for s in wanted or steps if s <= count)}))


def measure_circuits(
    case: Case, space: Space, circuits: list[Members], told: Callable[[int], None] | None = None
) -> Float[Tensor, " n"]:
    """The metric of each of `circuits`, float64."""
    return torch.tensor(metrics_of(case, space, circuits, told), dtype=torch.float64)


def curves_of(
    metrics: Float[Tensor, "prompts n"], ends: Float[Tensor, "prompts two"],
    sizes: Sequence[int], count: int, *, seed: int, held_out: bool,
) -> Curves:  # fmt: skip
    """The curves, from the metrics of `circuits_of` and the ends of each prompt."""
    of = metrics.numpy().reshape(len(metrics), len(sizes), count + 1, 2)
    far = ends.numpy()
    drawn = np.random.default_rng(seed).integers(len(far), size=(_RESAMPLES, len(far)))
    points = []
    for place, size in enumerate(sizes):
        own = [_over_prompts(of[:, place, 0, side], far, drawn) for side in (0, 1)]
        random = [_over_draws(of[:, place, 1:, side], far) for side in (0, 1)]
        points.append(
            CurvePoint(size=size, faithfulness=own[0], completeness=own[1],
                       random_faithfulness=random[0], random_completeness=random[1])
        )  # fmt: skip
    whole, empty = far.mean(0).tolist()
    return Curves(points=tuple(points), whole=whole, empty=empty, random_circuits=count,
                  prompts=len(far), held_out=held_out)  # fmt: skip


def _over_prompts(found: np.ndarray, ends: np.ndarray, drawn: np.ndarray) -> Spread:
    value = _share(found.mean(), ends.mean(0))
    if len(found) < 2:
        return Spread(value, None, None)
    whole, empty = ends[drawn].mean(1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        again = (found[drawn].mean(1) - empty) / (whole - empty)
    return _spread(value, again[np.isfinite(again)])


def _over_draws(found: np.ndarray, ends: np.ndarray) -> Spread:
    shares = np.array([_share(one, ends.mean(0)) for one in found.mean(0)])
    return _spread(float(shares.mean()), shares)


def _share(metric: float, ends: np.ndarray) -> float:
    whole, empty = ends
    return float((metric - empty) / (whole - empty)) + 0.0  # no -0.0


def _spread(value: float, drawn: np.ndarray) -> Spread:
    if not len(drawn):
        return Spread(value, None, None)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Spread(value, float(low), float(high))
