"""Attribution graphs for tests: random ones whose books close, and small ones by hand."""

import random

import torch

from gemscope.circuits._graph import Books, Edges, Graph, Kind, Node, Scores, Target
from gemscope.circuits._influence import graph_scores, influence

KINDS = (Kind.FEATURE, Kind.ERROR, Kind.BOS, Kind.EMBEDDING, Kind.BIAS, Kind.TARGET)
TOKENS = ("<bos>", "def", " add", "(", "a", ",", " b", ")", ":", " return", " a", " +")


def graph_of(nodes, edges, *, targets=None, scores=None, **more):
    """The graph of `nodes` and of `edges` `{(source id, target id): weight}`; its books close."""
    place = {node.id: at for at, node in enumerate(nodes)}
    made = Edges(
        torch.tensor([place[s] for s, _ in edges], dtype=torch.int32),
        torch.tensor([place[t] for _, t in edges], dtype=torch.int32),
        torch.tensor(list(edges.values()), dtype=torch.float32),
    )
    traced = torch.tensor([node.kind in (Kind.FEATURE, Kind.TARGET) for node in nodes])
    value = torch.zeros(len(nodes), dtype=torch.float64)
    value.index_add_(0, made.target.long(), made.weight.double())
    nothing = torch.full_like(value, torch.nan)
    last = max([0, *(node.position for node in nodes if node.position is not None)])
    n_targets = sum(node.kind is Kind.TARGET for node in nodes)
    total = sum(1 / (n + 1) for n in range(n_targets))
    if targets is None:
        targets = tuple(
            Target(
                text=f"token:{TOKENS[9 + n % 3]}", label=TOKENS[9 + n % 3], position=last,
                value=value[place[f"target.{n}"]].item(), weight=1 / (n + 1) / total, token=100 + n,
                probability=0.5 / (n + 1),
            )
            for n in range(n_targets)
        )  # fmt: skip
    layers = 1 + max([0, *(node.layer for node in nodes if node.layer is not None)])
    more = {
        "prompt": "def add(a, b): return a +", "model": "miniature",
        "tokens": tuple(TOKENS[n % 12] for n in range(last + 1)),
        "token_ids": tuple(range(2, last + 3)),
        "dictionaries": tuple(f"miniature/transcoder-{n}/width-1k" for n in range(layers)),
        "settings": {"node_threshold": 0.8, "version": "0"}, **more,
    }  # fmt: skip
    graph = Graph(
        nodes=tuple(nodes), edges=made, targets=targets, scores=Scores(replacement=0.0,
        completeness=0.0), influence=torch.zeros(len(nodes), dtype=torch.float64),
        books=Books(torch.where(traced, value, nothing), torch.where(traced, 0.0, nothing),
                    1e-7, 1e-4), **more,
    )  # fmt: skip
    found = influence(graph.edges, graph.kinds(Kind.BOS, Kind.BIAS), graph.starts())
    return graph_with(graph, influence=found, scores=scores or graph_scores(graph))


def graph_with(graph, **changes):
    from dataclasses import replace

    return replace(graph, **changes)


def random_graph(seed=0, n_layers=4, n_positions=5, n_features=12, *, n_targets=2, density=0.6):
    """A graph of `n_features` features, with every other node there can be; its books close."""
    draw = random.Random(seed)
    places = [(la, p) for la in range(n_layers) for p in range(1, n_positions)]
    chosen = {(*draw.choice(places), draw.randrange(500)) for _ in range(n_features)}
    nodes = [
        Node(Kind.FEATURE, la, p, f, activation=draw.uniform(0.1, 9)) for la, p, f in sorted(chosen)
    ]
    nodes += [Node(Kind.ERROR, la, p, activation=1.5) for la, p in places]
    nodes += [Node(Kind.BOS, la, 0, activation=20.0) for la in range(n_layers)]
    nodes += [Node(Kind.EMBEDDING, position=p, activation=1.0) for p in range(n_positions)]
    nodes += [Node(Kind.BIAS, la, activation=0.3) for la in range(n_layers)]
    nodes += [Node(Kind.TARGET, number=n, activation=4.0) for n in range(n_targets)]
    edges = {}
    for target in nodes:
        if target.kind not in (Kind.FEATURE, Kind.TARGET):
            continue
        before = [s for s in nodes if _leads(s, target)]
        some = [s for s in before if draw.random() < density] or before[:1]
        edges |= {(s.id, target.id): draw.gauss(0, 1) for s in some}
    return graph_of(nodes, edges)


def _leads(source, target):
    if source.kind is Kind.TARGET:
        return False
    if target.kind is Kind.TARGET:
        return True
    if source.kind is Kind.EMBEDDING:
        return source.position <= target.position
    if source.kind is Kind.BIAS:
        return source.layer <= target.layer
    return source.layer < target.layer and source.position <= target.position


def closes(graph, tolerance=1e-6):
    """Whether value is what is shown plus the remainder, wherever something comes in."""
    shown = torch.zeros(len(graph.nodes), dtype=torch.float64)
    shown.index_add_(0, graph.edges.target.long(), graph.edges.weight.double())
    known = ~graph.books.value.isnan()
    gap = (shown + graph.books.remainder - graph.books.value)[known].abs()
    return bool((gap <= tolerance).all()) and bool((shown[~known] == 0).all())
