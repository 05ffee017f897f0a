"""What a graph claims, and what happens when its sources are changed.

An edge claims what its source adds to its target directly. Its source is scaled by `1 + step`, so
the target is to move by `step` times its weight. A node claims what it adds to a target over all
ways. It is taken away whole, and what is predicted is the sum over all ways of the edges shown:
each feature in between changes in proportion to what comes into it.

Both are measured twice. `frozen` is the plain model with patterns, denominators and MLPs held
(`Held`): for edges features are held as well; for nodes every active feature responds by what its
pre-activation changes, whether it is shown or not. There an edge agrees to rounding, always; a node
does if nothing was pruned, and otherwise by how little was. `model` is the model itself: the change
is written to the MLP's output, errors stay as they are, and everything after is computed anew, the
other features' MLPs included. Nothing makes that agree: it is what the graph is worth. The target's
pre-activation is read, of a logit the one less the mean logit, before any cap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel
from gemscope.steering import agreement

from ._graph import Graph, Kind
from ._hold import Held, Perturbed, rows_at_once
from ._replay import Probe, Replay, Write
from ._rows import Progress
from ._transcoders import Load

STEP = 0.1
"""By how much of itself a source is changed: of what is not linear, a tenth is mostly so."""

CHANGED = (Kind.FEATURE, Kind.ERROR, Kind.EMBEDDING)
"""What is written by itself, and so can be changed by itself."""

USUAL = (Kind.FEATURE, Kind.ERROR)
"""What is changed if nobody says: the size of a token's embedding is divided away by norms, so
scaling one tells little of what the token does."""

_ABLATED = -1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """Sources that are changed, a row for each, what is read, and what is predicted of it."""

    sources: list[int]
    step: float
    targets: list[int]
    predicted: Float[Tensor, "sources targets"]
    pairs: list[tuple[int, int]]
    """Row and column of each claim."""


def check(
    graph: Graph,
    model: LanguageModel,
    n: int,
    *,
    step: int | float = STEP,
    kinds: Sequence[Kind] = USUAL,
    load: Load = load_sae,
    progress: Progress | None = None,
) -> Graph:
    """The graph with what interventions make of its `n` strongest edges and `n` strongest nodes.

    Edges by weight, nodes by influence; sources of other `kinds` than those given are passed over.
    `checked` has for each what is predicted and what was found; agreement is Pearson's r and the
    share with the same sign, of edges as `frozen` and `model`, of nodes as `frozen_nodes` and
    `model_nodes`, and of edges that begin at a kind as `model_feature`, `model_error` and
    `model_embedding`. Tokens agree least: norms divide away a change of all that a position holds.

    Raises:
        InputError: Not one edge, a step of 0 or above 1, kinds that are not written by themselves,
            another model than the graph's.
    """
    if n < 1:
        raise InputError(f"{n} edges are to be checked; give at least 1")
    if not 0 < abs(step) <= 1:
        raise InputError(
            f"a source cannot be changed by {step} of itself; give a share from -1 to 1 that is "
            f"not 0, such as {STEP}"
        )
    if not kinds or not set(kinds) <= set(CHANGED):
        raise InputError(
            f"{', '.join(kinds) or 'nothing'} cannot be changed; give {', '.join(CHANGED)}"
        )
    replay = Replay.of(graph, model, load)
    claims = (_edges(graph, n, float(step), kinds), _nodes(graph, n, kinds))
    total, done = sum(2 * len(claim.sources) for claim in claims), 0
    found: list[dict[str, Tensor]] = []
    for claim, respond in zip(claims, (False, True), strict=True):
        places = {
            "frozen": Held(model, replay.prompt.batch, replay.transcoders, replay.active,
                           respond=respond),
            "model": Perturbed(model, replay.prompt.batch),
        }  # fmt: skip
        found.append({})
        for name, place in places.items():
            parts = [torch.zeros(0, len(claim.targets), dtype=torch.float64)]
            for part in _measured(claim, replay, place):
                parts.append(part)
                done += len(part)
                if progress is not None:
                    progress("checks", done, total)
            found[-1][name] = torch.cat(parts)
    return replace(graph, checked=_said(graph, claims, found, float(step)))


def _edges(graph: Graph, n: int, step: float, kinds: Sequence[Kind]) -> _Claim:
    e = graph.edges
    size = e.weight.abs().masked_fill(~graph.kinds(*kinds)[e.source.long()], -1.0)
    best = size.topk(min(n, len(size))).indices
    best = best[size[best] > 0]
    ends = [(int(e.source[i]), int(e.target[i])) for i in best]
    sources = list(dict.fromkeys(s for s, _ in ends))
    targets = list(dict.fromkeys(t for _, t in ends))
    pairs = [(sources.index(s), targets.index(t)) for s, t in ends]
    predicted = torch.zeros(len(sources), len(targets), dtype=torch.float64)
    for (row, column), i in zip(pairs, best, strict=True):
        predicted[row, column] = step * e.weight[i]
    return _Claim(sources, step, targets, predicted, pairs)


def _nodes(graph: Graph, n: int, kinds: Sequence[Kind]) -> _Claim:
    strength = graph.influence.masked_fill(~graph.kinds(*kinds), -1.0)
    best = strength.topk(min(n, len(strength))).indices
    sources = best[strength[best] > 0].tolist()
    targets = graph.kinds(Kind.TARGET).nonzero()[:, 0].tolist()
    effects = total_effects(graph, sources) * _ABLATED
    predicted = effects[:, targets]
    # Of a target that no way shown leads to, nothing is claimed.
    pairs = [(row, column) for row, column in predicted.nonzero().tolist()]
    return _Claim(sources, _ABLATED, targets, predicted, pairs)


def total_effects(graph: Graph, sources: Sequence[int]) -> Float[Tensor, "sources n_nodes"]:
    """What each source adds to each node over all ways that the graph shows, in the node's units.

    Of the nodes between, each passes on the share of its value that came from the source. float64.
    """
    from scipy.sparse import coo_array  # type: ignore[import-untyped]

    e, n = graph.edges, len(graph.nodes)
    ends = (e.target.numpy(), e.source.numpy())
    into = coo_array((e.weight.double().numpy(), ends), shape=(n, n)).tocsr()
    value = graph.books.value.numpy(force=True).copy()
    # A feature's value is its activation: what it passes on. Nothing passes through a target.
    value[~graph.kinds(Kind.FEATURE).numpy()] = float("inf")
    # Nor through a feature that was not traced: nobody knows what comes into it.
    value[value != value] = float("inf")
    share = torch.zeros(n, len(sources), dtype=torch.float64).numpy()
    share[list(sources), range(len(sources))] = 1.0
    out = share * 0.0
    while share.any():
        added = into @ share
        out += added
        share = added / value[:, None]
    return torch.from_numpy(out.T.copy())


def _measured(claim: _Claim, replay: Replay, where: Perturbed) -> Iterator[Tensor]:
    """What changes at each target, some sources at a time; one row of each batch is unchanged."""
    graph = replay.graph
    assert graph is not None
    probes: list[Probe] = [replay.probe(graph.nodes[t]) for t in claim.targets]
    size = max(1, rows_at_once(replay.model, len(replay.prompt)) - 1)
    with torch.no_grad():
        for first in range(0, len(claim.sources), size):
            some = claim.sources[first : first + size]
            rows: list[list[Write]] = [
                [replace(w, vector=claim.step * w.vector) for w in replay.writes(graph.nodes[s])]
                for s in some
            ]
            values = where.probed([[], *rows], probes)
            yield (values[1:] - values[:1]).cpu()


def _said(
    graph: Graph, claims: Sequence[_Claim], found: Sequence[dict[str, Tensor]], step: float
) -> dict[str, Any]:
    def rows(claim: _Claim, measured: dict[str, Tensor], source: str) -> list[dict[str, Any]]:
        return [
            {
                source: graph.nodes[claim.sources[row]].id,
                "target": graph.nodes[claim.targets[column]].id,
                "predicted": claim.predicted[row, column].item(),
                "frozen": measured["frozen"][row, column].item(),
                "model": measured["model"][row, column].item(),
            }
            for row, column in claim.pairs
        ]

    def agree(some: list[dict[str, Any]], name: str) -> dict[str, Any]:
        made = agreement([(one["predicted"], one[name]) for one in some])
        return {"pearson": made.pearson, "same_sign": made.same_sign, "n": made.nodes}

    edges = rows(claims[0], found[0], "source")
    nodes = rows(claims[1], found[1], "id")
    by_kind = {
        kind: [one for one in edges if one["source"].startswith(f"{kind}.")] for kind in CHANGED
    }
    return {
        "step": step, "node_step": _ABLATED, "edges": edges, "nodes": nodes,
        "agreement": {
            "frozen": agree(edges, "frozen"), "model": agree(edges, "model"),
            "frozen_nodes": agree(nodes, "frozen"), "model_nodes": agree(nodes, "model"),
            **{f"model_{kind}": agree(some, "model") for kind, some in by_kind.items() if some},
        },
    }  # fmt: skip
