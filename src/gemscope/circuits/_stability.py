"""How much of a graph comes back in those of other prompts.

Tokens of other prompts stand elsewhere, so a node is compared without its position: a feature by
its layer and number, wherever it fires; an error by its layer; a token by its text; a target by
what was asked for. An edge is there if any edge between such nodes is. Constants are left out, for
they are always there. Positions and weights may differ in what returns.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel
from gemscope.relate import wilson

from ._graph import CONSTANTS, Graph, Kind, Node
from ._rows import Progress
from ._trace import trace
from ._transcoders import Load

_DRAWS = 2_000


def stability(
    graph: Graph,
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    load: Load = load_sae,
    seed: int = 0,
    progress: Progress | None = None,
    again: Callable[..., Graph] = trace,
) -> Graph:
    """The graph with how often its nodes and edges are in those of `prompts`.

    Each prompt is traced as the graph was, and pruned to the same shares; without targets that were
    asked for, to its own likeliest tokens. `stability` has the share of prompts in which each node
    and edge returns, with Wilson's 95% interval, and those that at least half of the prompts have
    and the graph lacks, whose `id` is None. Jaccard compares each prompt's nodes and edges with the
    graph's, and its features alone; the interval comes from resampling prompts, and of one prompt
    there is none.

    Raises:
        InputError: No prompts, one that cannot be traced, or the graph's own.
    """
    if not prompts:
        raise InputError("no other prompts were given; give at least one to compare with")
    if graph.prompt in prompts:
        raise InputError(
            f"{graph.prompt!r} is the graph's own prompt, in which everything returns; give others"
        )
    if len(set(prompts)) < len(prompts):
        (twice, _), *_ = Counter(prompts).most_common(1)
        raise InputError(f"the prompt {twice!r} is given twice; give each once")
    own = _keys(graph)
    found = []
    for number, prompt in enumerate(prompts):
        made = again(prompt, list(dict.fromkeys(graph.dictionaries)), model=model, load=load,
                     **_as_before(graph))  # fmt: skip
        found.append(_keys(made))
        if progress is not None:
            progress("prompts", number + 1, len(prompts))
    generator = np.random.default_rng(seed)
    shares = generator.multinomial(len(found), [1 / len(found)] * len(found), _DRAWS) / len(found)
    nodes, edges = (_returns([set(one[i]) for one in found], [*own[i]]) for i in (0, 1))
    return replace(graph, stability={
        "prompts": list(prompts), "seed": seed,
        "nodes": [{"key": key, "id": own[0].get(key), **how} for key, how in nodes],
        "edges": [{"source": s, "target": t, "id": own[1].get((s, t)), **how}
                  for (s, t), how in edges],
        "jaccard": {
            name: _jaccard([set(one[i]) for one in found], set(own[i]), shares)
            for i, name in enumerate(("nodes", "edges"))
        } | {"features": _jaccard([_features(one[0]) for one in found], _features(own[0]), shares)},
    })  # fmt: skip


def node_key(graph: Graph, node: Node) -> str:
    """What a node is called wherever it stands: `feature.3.17`, `error.3`, `embedding.def`."""
    match node.kind:
        case Kind.FEATURE:
            return f"{node.kind}.{node.layer}.{node.feature}"
        case Kind.EMBEDDING:
            return f"{node.kind}.{graph.tokens[node.position or 0]}"
        case Kind.TARGET:
            return f"{node.kind}.{graph.targets[node.number or 0].text}"
    return f"{node.kind}.{node.layer}"


def _keys(graph: Graph) -> tuple[dict[str, str], dict[tuple[str, str], list[str]]]:
    """Nodes by key with the id of the one that matters most; edges with the ids of the heaviest.

    Only tokens that lead somewhere are nodes here: all others are in every graph of their prompt.
    """
    left = (*CONSTANTS, Kind.TARGET)
    linked = {*graph.edges.source.tolist(), *graph.edges.target.tolist()}
    order = graph.influence.argsort(stable=True).tolist()
    keys = [node_key(graph, node) for node in graph.nodes]
    nodes = {keys[i]: graph.nodes[i].id for i in order
             if graph.nodes[i].kind not in left and i in linked}  # fmt: skip
    edges = {}
    for i in graph.edges.weight.abs().argsort(stable=True).tolist():
        source, target = int(graph.edges.source[i]), int(graph.edges.target[i])
        if graph.nodes[source].kind not in CONSTANTS:
            edges[keys[source], keys[target]] = [graph.nodes[source].id, graph.nodes[target].id]
    return nodes, edges


def _features(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.startswith(f"{Kind.FEATURE}.")}


def _as_before(graph: Graph) -> dict[str, Any]:
    names = ("targets", "node_threshold", "edge_threshold", "max_features", "chat")
    return {name: graph.settings[name] for name in names if name in graph.settings}


def _returns(found: Sequence[set[Any]], own: Sequence[Any]) -> list[tuple[Any, dict[str, float]]]:
    """How often each returns, those of the graph first; the most frequent first."""
    counts = Counter(key for keys in found for key in keys)
    mine = set(own)
    new = [key for key, n in counts.items() if key not in mine and 2 * n >= len(found)]
    ordered = [*sorted(own, key=lambda key: (-counts[key], key)),
               *sorted(new, key=lambda key: (-counts[key], key))]  # fmt: skip
    out = []
    for key in ordered:
        low, high = wilson(counts[key], len(found))
        out.append((key, {"share": counts[key] / len(found), "low": low, "high": high}))
    return out


def _jaccard(found: Sequence[set[Any]], own: set[Any], shares: np.ndarray) -> dict[str, Any]:
    each = np.array([len(one & own) / len(one | own) if one | own else 1.0 for one in found])
    out: dict[str, Any] = {"mean": float(each.mean()), "low": None, "high": None}
    if len(each) > 1:
        out["low"], out["high"] = np.quantile(shares @ each, [0.025, 0.975]).tolist()
    return out | {"each": each.tolist()}
