"""A circuit over SAEs as a value: nodes with their effects, edges, curves."""

from dataclasses import dataclass
from typing import Any

from gemscope.errors import InputError

from ._sparse_config import CircuitConfig
from ._sparse_curves import Curves, Spread
from ._sparse_space import SparseNode

METRIC = "metric"
"""What edges to the metric itself name as their target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitNode:
    """A node, what ablating it does to the metric, and what it is called."""

    node: SparseNode
    effect: Spread
    """Estimated change of the metric, mean over the examples, with an interval over them."""
    exact: float | None
    """The change when it is ablated by itself; None where it was not measured."""
    label: str | None = None

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return self.node.json() | {
            "effect": self.effect.json(), "exact": self.exact, "label": self.label,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class CircuitEdge:
    """What of the source's effect passes straight to the target, by ids; mean over examples."""

    source: str
    target: str
    weight: float

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {"source": self.source, "target": self.target, "weight": self.weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An example with its metric."""

    text: str
    tokens: tuple[str, ...]
    corrupted_text: str | None
    metric: str
    at: int | None
    clean: float
    corrupted: float | None
    empty: float
    """The metric with everything ablated."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "clean": self.text, "tokens": list(self.tokens), "corrupted": self.corrupted_text,
            "metric": self.metric, "at": self.at, "clean_metric": self.clean,
            "corrupted_metric": self.corrupted, "nothing_metric": self.empty,
        }  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Circuit:
    """A circuit over SAEs, and how well it stands for the model."""

    config: CircuitConfig
    model: str | None
    examples: tuple[Measured, ...]
    held_out: tuple[Measured, ...]
    nodes: tuple[CircuitNode, ...]
    """Those that reach the threshold, the largest effects first."""
    above: int
    """How many reach it; more than `nodes` where `max_nodes` cut them."""
    count: int
    """Nodes that change at all."""
    edges: tuple[CircuitEdge, ...]
    """Those that reach the threshold, the largest first; the target may be `metric`."""
    agreement: dict[str, Any]
    """Of estimates and exact effects: nodes, Pearson, Spearman, same sign."""
    sums: dict[str, dict[str, float]]
    """For each dictionary, what all its estimates sum to: `features` and `errors`."""
    curves: Curves

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of its dictionaries, in the order a pass computes their sites."""
        return tuple(self.sums)

    def node(self, name: str) -> CircuitNode:
        """The node with this id."""
        for one in self.nodes:
            if one.node.id == name:
                return one
        raise InputError(
            f"the circuit has no node {name}; ids look like "
            f"{self.nodes[0].node.id if self.nodes else 'ADDRESS/INDEX'}"
        )

    def json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            "task": self.config.task, "model": self.model, "dictionaries": list(self.addresses),
            "settings": self.config.model_dump(
                mode="json", exclude={"examples", "held_out", "dictionaries", "model", "task"}
            ),
            "examples": [one.json() for one in self.examples],
            "held_out": [one.json() for one in self.held_out],
            "nodes_that_change": self.count, "nodes_above_threshold": self.above,
            "nodes": [one.json() for one in self.nodes],
            "edges": [one.json() for one in self.edges],
            "agreement": self.agreement, "sums": self.sums, "curves": self.curves.json(),
        }  # fmt: skip
