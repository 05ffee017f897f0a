"""An attribution graph as a value: nodes, weighted edges, the targets it explains, and its books.

An edge's weight is what its source adds to the value of its target in the frozen model, in the
target's own units. For every node that was traced (features and targets) the weights that come in
sum to its value: what is not shown is counted in `Books.remainder`.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.errors import InputError


class Kind(StrEnum):
    """What a node stands for."""

    FEATURE = "feature"
    """A feature that is active at a position."""
    ERROR = "error"
    """What the transcoders leave of an MLP's output at a position."""
    EMBEDDING = "embedding"
    """The token at a position."""
    BOS = "bos"
    """An MLP's output at a position that no dictionary was trained on: BOS, a chat's prefix."""
    BIAS = "bias"
    """Constants of a layer, at all positions together, and its features' own biases."""
    TARGET = "target"
    """What the graph explains."""


CONSTANTS = (Kind.BOS, Kind.BIAS)
"""Kinds that do not depend on what the prompt says. They close the books, and are left out of
influence and scores."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `activation` is a feature's, a target's value, the norm of anything else."""

    kind: Kind
    layer: int | None = None
    position: int | None = None
    feature: int | None = None
    """Number of the feature in its dictionary; of a cross-layer transcoder through all layers."""
    activation: float = 0.0
    number: int | None = None
    """Which of the graph's targets it is."""

    @property
    def id(self) -> str:
        """Unique in a graph: the kind, then what sets it apart, such as `feature.3.17.5`."""
        parts = {
            Kind.FEATURE: (self.layer, self.feature, self.position),
            Kind.ERROR: (self.layer, self.position),
            Kind.EMBEDDING: (self.position,),
            Kind.BOS: (self.layer, self.position),
            Kind.BIAS: (self.layer,),
            Kind.TARGET: (self.number,),
        }[self.kind]
        return ".".join(map(str, (self.kind, *parts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something the graph explains."""

    text: str
    """As one asks for it, such as `token: return`."""
    label: str
    """As it is shown."""
    position: int
    value: float
    """In the frozen model: a logit without soft-cap, less the mean logit; a pre-activation."""
    weight: float
    """Share of the influence that begins here."""
    token: int | None = None
    probability: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """Edges as three columns; no pair of nodes twice."""

    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    weight: Float[Tensor, " n_edges"]

    def __len__(self) -> int:
        return len(self.weight)

    def only(self, keep: Bool[Tensor, " n_edges"]) -> "Edges":
        """Some of them."""
        return Edges(self.source[keep], self.target[keep], self.weight[keep])


@dataclass(frozen=True, slots=True, eq=False)
class Books:
    """What comes into each node, `[n_nodes]`, float64; NaN where nothing does."""

    value: Float[Tensor, " n_nodes"]
    """The value that all that comes in sums to."""
    remainder: Float[Tensor, " n_nodes"]
    """The part of it that comes over edges not shown."""
    error: float
    """Largest difference of a value from its sum, before anything was pruned."""
    tolerance: float
    """What rounding can make of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How much of a graph is explained, from 0 to 1."""

    replacement: float
    """Share of the influence on the targets that reaches tokens, and not errors."""
    completeness: float
    """Share of what comes into nodes, by their influence, that does not come from errors."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are shown as one."""

    label: str
    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Graph:
    """An attribution graph of one prompt."""

    prompt: str
    tokens: tuple[str, ...]
    """As they are shown, one for each position; BOS is the first."""
    token_ids: tuple[int, ...]
    model: str
    dictionaries: tuple[str, ...]
    """Address for each layer; of a cross-layer transcoder the same for all."""
    nodes: tuple[Node, ...]
    edges: Edges
    targets: tuple[Target, ...]
    books: Books
    influence: Float[Tensor, " n_nodes"]
    """Of each node on the targets, float64: 1 is all of it."""
    scores: Scores
    labels: dict[str, str] = field(default_factory=dict)
    """What a feature is called, by `ADDRESS/INDEX`, and what somebody renamed, by node id."""
    groups: tuple[Group, ...] = ()
    pinned: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was made: thresholds, dtype, version."""
    checked: dict[str, Any] | None = None
    """What interventions made of its claims."""
    stability: dict[str, Any] | None = None
    """How often its nodes and edges return."""

    @cached_property
    def places(self) -> dict[str, int]:
        """Place of each node by its id."""
        return {node.id: place for place, node in enumerate(self.nodes)}

    def place(self, node: str) -> int:
        """Place of the node with this id."""
        if node not in self.places:
            raise InputError(f"the graph has no node {node}; ids look like {self.nodes[0].id}")
        return self.places[node]

    def address(self, node: Node) -> str | None:
        """`ADDRESS/INDEX` of a feature's node."""
        if node.kind is not Kind.FEATURE or node.layer is None:
            return None
        return f"{self.dictionaries[node.layer]}/{node.feature}"

    def label(self, node: Node) -> str:
        """What a node is called: its own name, its feature's, or what it stands for."""
        if node.id in self.labels:
            return self.labels[node.id]
        if (address := self.address(node)) in self.labels:
            return self.labels[address]
        match node.kind:
            case Kind.FEATURE:
                return f"feature {node.feature}"
            case Kind.ERROR:
                return "error"
            case Kind.EMBEDDING:
                return f"token {self.tokens[node.position or 0]}"
            case Kind.BOS:
                return f"MLP at {self.tokens[node.position or 0]}"
            case Kind.BIAS:
                return f"biases of layer {node.layer}"
            case Kind.TARGET:
                return self.targets[node.number or 0].label

    def kinds(self, *kinds: Kind) -> Bool[Tensor, " n_nodes"]:
        """Which nodes are of these kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes], dtype=torch.bool)

    def starts(self) -> Float[Tensor, " n_nodes"]:
        """The share of influence that begins at each node: targets' weights, float64."""
        return torch.tensor(
            [self.targets[n.number].weight if n.number is not None else 0.0 for n in self.nodes],
            dtype=torch.float64,
        )

    def part(self, keep: Bool[Tensor, " n_nodes"], edges: Bool[Tensor, " n_edges"]) -> "Graph":
        """The graph of some nodes and of those of the given edges that lie between them.

        What came over others is added to the remainder, so the books still close. Influence and
        scores stay those of the graph it is a part of.
        """
        ends = keep[self.edges.source] & keep[self.edges.target]
        kept = self.edges.only(edges & ends)
        gone = self.edges.only(~(edges & ends))
        rest = self.books.remainder.clone()
        # NaN stays NaN: nothing comes into those.
        rest.index_add_(0, gone.target.long(), gone.weight.double())
        new = keep.cumsum(0) - 1
        return replace(
            self,
            nodes=tuple(n for n, k in zip(self.nodes, keep.tolist(), strict=True) if k),
            edges=Edges(new[kept.source.long()], new[kept.target.long()], kept.weight),
            books=replace(self.books, value=self.books.value[keep], remainder=rest[keep]),
            influence=self.influence[keep],
        )

    def json(self) -> dict[str, Any]:
        """The graph as one JSON object; numbers are rounded to what float32 tells apart."""
        ids = [node.id for node in self.nodes]
        return {
            "prompt": self.prompt, "tokens": list(self.tokens), "model": self.model,
            "dictionaries": list(self.dictionaries),
            "nodes": [self._node(place) for place in range(len(self.nodes))],
            "edges": [
                {"source": ids[s], "target": ids[t], "weight": w}
                for s, t, w in zip(self.edges.source.tolist(), self.edges.target.tolist(),
                                   map(_short, self.edges.weight.tolist()), strict=True)
            ],
            "targets": [_target(one, number) for number, one in enumerate(self.targets)],
            "scores": {"replacement": self.scores.replacement,
                       "completeness": self.scores.completeness},
            "closure": {"max_abs_error": self.books.error, "tolerance": self.books.tolerance},
            "groups": [{"label": g.label, "ids": list(g.ids)} for g in self.groups],
            "pinned": list(self.pinned), "checked": self.checked, "stability": self.stability,
            "settings": self.settings,
        }  # fmt: skip

    def _node(self, place: int) -> dict[str, Any]:
        node, value = self.nodes[place], self.books.value[place].item()
        known = value == value  # not NaN
        return {
            "id": node.id, "kind": str(node.kind), "layer": node.layer, "position": node.position,
            "feature": node.feature, "activation": _short(node.activation),
            "influence": _short(self.influence[place].item()), "label": self.label(node),
            "address": self.address(node), "value": _short(value) if known else None,
            "remainder": _short(self.books.remainder[place].item()) if known else None,
        }  # fmt: skip


def _target(one: Target, number: int) -> dict[str, Any]:
    return {
        "id": f"{Kind.TARGET}.{number}", "text": one.text, "label": one.label,
        "position": one.position, "value": one.value, "weight": one.weight, "token": one.token,
        "probability": one.probability,
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.7g}")
