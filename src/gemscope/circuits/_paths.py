"""The strongest paths from tokens to targets, as sentences.

A path's share is that of the influence which goes along it: the target's weight times, for each
edge, its part of all that is shown to come into where it leads. Shares of all paths sum to 1, with
those that begin at errors.
"""

import heapq
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError

from ._graph import CONSTANTS, Edges, Graph, Kind, Node
from ._influence import check_acyclic, edge_shares
from ._json import clean


@dataclass(frozen=True, slots=True)
class Path:
    """From a token, or a feature that nothing shown comes into, to a target."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    """Of the edge from each node to the next."""
    share: float
    sentence: str


def strongest_paths(graph: Graph, n: int = 10, *, errors: bool = False) -> list[Path]:
    """The `n` paths of the largest share, largest first; `errors` also from errors.

    Raises:
        InputError: `n` is below 1, or the graph goes round in a circle.
    """
    if n < 1:
        raise InputError(f"how many paths? give at least 1, not {n}")
    flow = graph.edges.only(~graph.kinds(*CONSTANTS)[graph.edges.source.long()])
    check_acyclic(flow, len(graph.nodes))
    shares = edge_shares(flow, len(graph.nodes))
    best = _best(graph, flow, shares, errors=errors)
    into: list[list[tuple[int, float, float]]] = [[] for _ in graph.nodes]
    for s, t, w, share in zip(flow.source.tolist(), flow.target.tolist(), flow.weight.tolist(),
                              shares.tolist(), strict=True):  # fmt: skip
        into[t].append((s, w, share))
    # Ordered by the best that can still come of a beginning: what is popped first is strongest.
    order = count()
    heap: list[tuple[float, int, float, tuple[int, ...], tuple[float, ...]]] = []
    for place, start in enumerate(graph.starts().tolist()):
        if start * best[place] > 0:
            heapq.heappush(heap, (-start * best[place], next(order), start, (place,), ()))
    found: list[Path] = []
    while heap and len(found) < n:
        _, _, share, places, weights = heapq.heappop(heap)
        if not into[places[0]]:
            found.append(_path(graph, places, weights, share))
            continue
        for s, w, part in into[places[0]]:
            if share * part * best[s] > 0:
                more = (-share * part * best[s], next(order), share * part, (s, *places))
                heapq.heappush(heap, (*more, (w, *weights)))
    return found


def _best(
    graph: Graph, flow: Edges, shares: Float[Tensor, " n_edges"], *, errors: bool
) -> list[float]:
    """The largest share that a way from a source to each node keeps."""
    source, target = flow.source.long(), flow.target.long()
    fed = torch.zeros(len(graph.nodes), dtype=torch.bool)
    fed[target] = True
    kinds = (Kind.EMBEDDING, Kind.FEATURE, *((Kind.ERROR,) if errors else ()))
    begins = (graph.kinds(*kinds) & ~fed).double()
    best = begins
    while True:
        new = begins.scatter_reduce(0, target, best[source] * shares, "amax")
        if torch.equal(new, best):
            return best.tolist()
        best = new


def _path(graph: Graph, places: tuple[int, ...], weights: tuple[float, ...], share: float) -> Path:
    nodes = [graph.nodes[place] for place in places]
    said = node_name(graph, nodes[0])
    for node, weight in zip(nodes[1:], weights, strict=True):
        said += f" → ({weight:+.3g}) {node_name(graph, node)}"
    return Path(tuple(node.id for node in nodes), weights, share, said)


def node_name(graph: Graph, node: Node) -> str:
    """A node as a sentence names it: `feature 3.17 "function names" (4)`, with its position."""
    at = "" if node.position is None else f" ({node.position})"
    label = clean(graph.label(node))
    named = node.id in graph.labels or graph.address(node) in graph.labels
    match node.kind:
        case Kind.FEATURE:
            name = f"feature {node.layer}.{node.feature}"
            return f'{name} "{label}"{at}' if named else f"{name}{at}"
        case Kind.TARGET:
            return f'"{label}"'
        case Kind.EMBEDDING:
            token = label if named else clean(graph.tokens[node.position or 0])
            return f'token "{token}"{at}'
        case Kind.ERROR:
            return f"error of layer {node.layer}{at}" + (f' "{label}"' if named else "")
    return f"{label}{at}"
