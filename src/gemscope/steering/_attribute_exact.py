"""Estimates beside what they estimate: the metric after changing a feature for real."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sites import Site

from ._intervene_view import Added, View
from ._metric import Measuring, rows_that_fit
from ._target import Part, feature_target

if TYPE_CHECKING:
    from ._attribute import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well estimates agree with exact effects, over the nodes that have both."""

    nodes: int
    pearson: float | None
    """Of estimates and exact effects; None for fewer than 3, or where either does not vary."""
    spearman: float | None
    """The same of their ranks."""
    same_sign: float | None
    """Share with the same sign, of those whose exact effect is not 0."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {name: getattr(self, name) for name in self.__slots__}


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """Of pairs of an estimate and an exact effect."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    a, b = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    moved = b != 0
    return Agreement(
        nodes=len(a),
        pearson=_pearson(a, b),
        spearman=_pearson(rankdata(a), rankdata(b)),
        same_sign=float((np.sign(a) == np.sign(b))[moved].mean()) if moved.any() else None,
    )


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


@torch.no_grad()
def exact_effects(
    measuring: Measuring,
    nodes: "Sequence[Node]",
    here: View,
    there: View | None,
    before: float,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Change each node by itself at all its positions, and note the change of the metric.

    What is added is known from the clean run: nothing before a node's sites is touched.
    """
    length = len(measuring.clean)
    step = rows_that_fit(measuring.model, length)
    for first in range(0, len(nodes), step):
        some = nodes[first : first + step]
        changes = [_change(node, here, there, length) for node in some]
        sites = {site for change in changes for site in change}
        what = {
            site: torch.stack([_of(change, site, changes) for change in (*changes, {})])
            for site in sites
        }
        found = measuring.effects(len(some), Added(what), before)
        for node, effect in zip(some, found, strict=True):
            node.exact = effect
        if progress is not None:
            progress("exact effects", first + len(some), len(nodes))


def _of(change: dict[Site, Tensor], site: Site, all_: Sequence[dict[Site, Tensor]]) -> Tensor:
    if site in change:
        return change[site]
    return torch.zeros_like(next(c[site] for c in all_ if site in c))


def _change(
    node: "Node", here: View, there: View | None, length: int
) -> dict[Site, Float[Tensor, "seq d"]]:
    """What is added at each site, float64."""
    if node.index is None:
        (site,) = node.sites
        moved = -here.part(node.sae, Part.ERROR, site)
        if there is not None:
            moved = moved + there.part(node.sae, Part.ERROR, site)
        kept = torch.zeros(length, dtype=torch.bool, device=moved.device)
        kept[node.positions] = True
        return {site: moved * kept[:, None]}
    rows = feature_target(node.sae, node.index).feature.rows
    values = torch.zeros(length, dtype=torch.float64)
    values[node.positions] = torch.tensor(
        [b - a for a, b in zip(node.clean, node.other, strict=True)], dtype=torch.float64
    )
    return {site: values.to(row.device)[:, None] * row.double() for site, row in rows.items()}
