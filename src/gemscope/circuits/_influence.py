"""What in a graph matters: influence on the targets, scores, pruning.

The definitions are circuit-tracer's (`prune_graph` and `compute_graph_scores` of its version 0.5),
with three differences. Constants, which it has no nodes for, are left out of sums and flow. What
targets begin with counts as their own influence. A threshold of 1 keeps all that has any
influence; there, it is rounding that decides.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemscope.errors import InputError

from ._graph import CONSTANTS, Edges, Graph, Group, Kind, Scores

_LEAST = 1e-10
"""A row that sums to less is divided by this, as in circuit-tracer."""


class Flow:
    """How influence passes edges: those that come into a node share out its own by their absolute
    weights, without what comes from `constants`.

    `acyclic` says that somebody knows no edge to lead back, which is checked otherwise.
    """

    def __init__(self, edges: Edges, constants: Bool[Tensor, " n_nodes"], *, acyclic: bool = False):
        self.edges = edges.only(~constants[edges.source.long()])
        if not acyclic:
            check_acyclic(self.edges, len(constants))
        self.shares = edge_shares(self.edges, len(constants))
        """Of each of `edges`, float64."""
        self._n = len(constants)

    def through(self, starts: Float[Tensor, " n_nodes"]) -> Float[Tensor, " n_nodes"]:
        """What goes through each node of what begins at `starts`, float64."""
        from scipy.sparse import coo_array  # type: ignore[import-untyped]

        ends = (self.edges.source.numpy(), self.edges.target.numpy())
        passed = coo_array((self.shares.numpy(), ends), shape=(self._n, self._n)).tocsr()
        found = starts.double().numpy().copy()
        now = found.copy()
        while now.any():
            now = passed @ now
            found += now
        return torch.from_numpy(found)


def influence(
    edges: Edges, constants: Bool[Tensor, " n_nodes"], starts: Float[Tensor, " n_nodes"]
) -> Float[Tensor, " n_nodes"]:
    """The share of the influence that begins at the targets which goes through each node, float64.

    Edges that come into a node share out its influence by their absolute weights; `constants` are
    nodes that get none. `starts` is what begins at each node, and is part of its influence.
    """
    return Flow(edges, constants).through(starts)


def scores(
    edges: Edges,
    constants: Bool[Tensor, " n_nodes"],
    starts: Float[Tensor, " n_nodes"],
    *,
    errors: Bool[Tensor, " n_nodes"],
    tokens: Bool[Tensor, " n_nodes"],
) -> Scores:
    """How much of what comes to the targets is explained; `errors` and `tokens` are its sources.

    Both are exactly 1 where no influence reaches an error.
    """
    flow = Flow(edges, constants)
    return flow_scores(flow, flow.through(starts), errors=errors, tokens=tokens)


def flow_scores(
    flow: Flow,
    through: Float[Tensor, " n_nodes"],
    *,
    errors: Bool[Tensor, " n_nodes"],
    tokens: Bool[Tensor, " n_nodes"],
) -> Scores:
    """The same, where the influence of every node is known."""
    at_tokens, at_errors = through[tokens].sum().item(), through[errors].sum().item()
    into = torch.zeros_like(through)
    wrong = errors[flow.edges.source.long()]
    into.index_add_(0, flow.edges.target[wrong].long(), flow.shares[wrong])
    everything = through.sum().item()
    return Scores(
        replacement=at_tokens / (at_tokens + at_errors) if at_errors else 1.0,
        # Less a sum of shares, where circuit-tracer sums what is left: exactly 1 without errors.
        completeness=1 - (into * through).sum().item() / everything if everything else 1.0,
    )


def graph_scores(graph: Graph) -> Scores:
    """The scores of the edges a graph has; `graph.scores` are those of the whole."""
    return scores(
        graph.edges, graph.kinds(*CONSTANTS), graph.starts(),
        errors=graph.kinds(Kind.ERROR), tokens=graph.kinds(Kind.EMBEDDING),
    )  # fmt: skip


def subgraph_scores(graph: Graph, ids: Sequence[str]) -> Scores:
    """The scores if only the features named by `ids` explained anything.

    Every other feature becomes part of the error of its layer and position: its edges are added
    to that error's, and what comes into it is forgotten. Other nodes stay whether named or not.
    Only edges that the graph has count: of a pruned graph, the part that is shown.
    """
    named = {graph.place(one) for one in ids}
    n = len(graph.nodes)
    errors = {(one.layer, one.position): place for place, one in enumerate(graph.nodes)
              if one.kind is Kind.ERROR}  # fmt: skip
    to = list(range(n))
    for place, one in enumerate(graph.nodes):
        if one.kind is Kind.FEATURE and place not in named:
            to[place] = errors.setdefault((one.layer, one.position), n + len(errors))
    size = max([n, *(place + 1 for place in errors.values())])
    moved = torch.tensor(to)
    stays = moved[graph.edges.target.long()] == graph.edges.target
    edges = graph.edges.only(stays)
    edges = summed(Edges(moved[edges.source.long()], edges.target, edges.weight), size)

    def grown(mask: Tensor) -> Tensor:
        return torch.cat([mask, mask.new_zeros(size - n)])

    wrong = grown(graph.kinds(Kind.ERROR))
    wrong[torch.tensor(sorted(errors.values()), dtype=torch.long)] = True
    return scores(
        edges, grown(graph.kinds(*CONSTANTS)), grown(graph.starts()),
        errors=wrong, tokens=grown(graph.kinds(Kind.EMBEDDING)),
    )  # fmt: skip


def pruned(
    graph: Graph, *, nodes: int | float = 0.8, edges: int | float = 0.98,
    known: Float[Tensor, " n_nodes"] | None = None,
) -> Graph:  # fmt: skip
    """The part of a graph that carries these shares of its influence; its books still close.

    Features and errors are kept to a cumulative share of `nodes` of the influence, then edges to
    one of `edges`; features and errors that lead nowhere and features that nothing comes into are
    dropped until all left are on a way to a target. Embeddings, targets and what is pinned always
    stay. Constants have no share: their edges stay where they weigh as much as others that do.
    `known` is the influence over the edges that the graph has, if somebody knows it.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise InputError(
                f"a graph is pruned to a share of the influence of its {name}, "
                f"from 0 to 1, such as 0.8; not {share}"
            )
    n, ends = len(graph.nodes), graph.edges
    source, target = ends.source.long(), ends.target.long()
    constants, starts = graph.kinds(*CONSTANTS), graph.starts()
    always = graph.kinds(Kind.EMBEDDING, Kind.TARGET, *CONSTANTS)
    always[[graph.place(one) for one in graph.pinned]] = True

    # Without what begins at targets, which would leave less of the share to everything else.
    whole = influence(ends, constants, starts) if known is None else known
    keep = _largest(whole - starts, ~constants, nodes) | always
    among = keep[source] & keep[target]
    flows = among & ~constants[source]
    sums = _row_sums(ends.only(flows), n)
    through = influence(ends.only(among), constants, starts)
    strength = ends.weight.double().abs() / sums[target] * through[target]
    shown = among & _largest(strength, flows, edges)

    sources = graph.kinds(Kind.FEATURE, Kind.ERROR) & ~always
    fed = graph.kinds(Kind.FEATURE) & ~always
    while True:
        shown &= keep[source] & keep[target]
        out = torch.zeros(n, dtype=torch.bool)
        out[source[shown]] = True
        into = torch.zeros(n, dtype=torch.bool)
        into[target[shown & ~constants[source]]] = True
        gone = keep & ((sources & ~out) | (fed & ~into))
        if not gone.any():
            break
        keep = keep & ~gone
    return _without_lost(graph.part(keep & (~constants | out), shown))


def summed(edges: Edges, n_nodes: int) -> Edges:
    """Edges of which those between the same two nodes have become one, float64."""
    key = edges.source.long() * n_nodes + edges.target.long()
    pairs, which = torch.unique(key, return_inverse=True)
    weight = torch.zeros(len(pairs), dtype=torch.float64)
    weight.index_add_(0, which, edges.weight.double())
    return Edges(
        (pairs // n_nodes).to(edges.source.dtype), (pairs % n_nodes).to(edges.target.dtype), weight
    )


def edge_shares(flow: Edges, n_nodes: int) -> Float[Tensor, " n_edges"]:
    """What part of all that comes into its target an edge is."""
    return flow.weight.double().abs() / _row_sums(flow, n_nodes)[flow.target.long()]


def check_acyclic(flow: Edges, n_nodes: int) -> None:
    """Refuse a graph in which influence would go round forever."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    ends = (flow.source.numpy(), flow.target.numpy())
    joined = coo_array((np.ones(len(flow), dtype=np.int8), ends), shape=(n_nodes, n_nodes))
    count, _ = connected_components(joined, directed=True, connection="strong")
    if count < n_nodes or bool((flow.source == flow.target).any()):
        raise InputError(
            "the graph goes round in a circle: a node leads back to itself, and influence is told "
            "only where every edge leads on toward a target"
        )


def cumulative(influence: Float[Tensor, " n_nodes"]) -> Float[Tensor, " n_nodes"]:
    """The share of all influence that a node and those above it have: small where it matters."""
    order = influence.argsort(descending=True, stable=True)
    shares = influence[order].cumsum(0)
    found = torch.zeros_like(influence)
    found[order] = shares / shares[-1].clamp(min=_LEAST) if len(order) else shares
    return found


def _without_lost(graph: Graph) -> Graph:
    """Without the names of nodes that are gone."""
    groups = [Group(g.label, tuple(i for i in g.ids if i in graph.places)) for g in graph.groups]
    return replace(
        graph,
        groups=tuple(g for g in groups if g.ids),
        pinned=tuple(one for one in graph.pinned if one in graph.places),
    )


def _row_sums(flow: Edges, n_nodes: int) -> Float[Tensor, " n_nodes"]:
    sums = torch.zeros(n_nodes, dtype=torch.float64)
    sums.index_add_(0, flow.target.long(), flow.weight.double().abs())
    return sums.clamp(min=_LEAST)


def _largest(
    values: Float[Tensor, " n"], counted: Bool[Tensor, " n"], share: int | float
) -> Bool[Tensor, " n"]:
    """Which values are as large as those that make up a share of the sum of the counted."""
    if share >= 1:
        return values > 0
    order = values[counted].sort(descending=True).values
    running = order.cumsum(0)
    if not len(order) or running[-1] <= 0:
        return torch.zeros_like(counted)
    place = int(torch.searchsorted(running / running[-1], share))
    return values >= order[min(place, len(order) - 1)]
