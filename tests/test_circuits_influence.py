"""Influence, scores and pruning: by hand, by laws, and against a dense rewrite of the rules."""

import pytest
import torch
from circuits_graphs import closes, graph_of, graph_with, random_graph

from gemscope.circuits._graph import CONSTANTS, Edges, Kind, Node
from gemscope.circuits._influence import (
    cumulative,
    graph_scores,
    influence,
    pruned,
    subgraph_scores,
    summed,
)
from gemscope.errors import InputError

SEEDS = range(12)


def small():
    """Token and error into a feature; feature, error and a constant into the target."""
    nodes = [
        Node(Kind.FEATURE, 0, 1, 7, 2.0), Node(Kind.ERROR, 0, 1), Node(Kind.ERROR, 1, 1),
        Node(Kind.EMBEDDING, position=1), Node(Kind.BIAS, 0), Node(Kind.TARGET, number=0),
    ]  # fmt: skip
    edges = {
        ("embedding.1", "feature.0.7.1"): 3.0, ("error.0.1", "feature.0.7.1"): -1.0,
        ("feature.0.7.1", "target.0"): -2.0, ("error.1.1", "target.0"): 2.0,
        ("bias.0", "target.0"): 100.0, ("bias.0", "feature.0.7.1"): 50.0,
    }  # fmt: skip
    return graph_of(nodes, edges)


def dense(graph):
    """What circuit-tracer computes with: a matrix of target by source, without constants."""
    matrix = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    matrix[graph.edges.target.long(), graph.edges.source.long()] = graph.edges.weight.double()
    matrix[:, graph.kinds(*CONSTANTS)] = 0
    return matrix


def shares(matrix):
    return matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp(min=1e-10)


def reached(matrix, starts):
    total, now = torch.zeros_like(starts), starts
    while now.any():
        now = now @ shares(matrix)
        total = total + now
    return total


def at_threshold(values, share):
    order = values.flatten().sort(descending=True).values
    running = order.cumsum(0) / order.sum()
    return order[min(int(torch.searchsorted(running, share)), len(order) - 1)]


def slowly_pruned(graph, node_share, edge_share):
    """Ids that stay and the pairs of ids that stay joined, constants left out."""
    keep_out = graph.kinds(*CONSTANTS)
    always = graph.kinds(Kind.EMBEDDING, Kind.TARGET)
    feature, source = graph.kinds(Kind.FEATURE), graph.kinds(Kind.FEATURE, Kind.ERROR)
    matrix, starts = dense(graph), graph.starts()
    found = reached(matrix, starts)
    keep = ((found >= at_threshold(found, node_share)) | always) & ~keep_out
    matrix[~keep] = 0
    matrix[:, ~keep] = 0
    strength = shares(matrix) * (reached(matrix, starts) + starts)[:, None]
    joined = (strength >= at_threshold(strength, edge_share)) & (matrix != 0)
    while True:
        new = keep & (joined.any(0) | ~source) & (joined.any(1) | ~feature)
        if (new == keep).all():
            break
        keep = new
        joined[~keep] = False
        joined[:, ~keep] = False
    ids = [node.id for node in graph.nodes]
    pairs = {(ids[s], ids[t]) for t, s in joined.nonzero().tolist()}
    return {one for one, kept in zip(ids, keep.tolist(), strict=True) if kept}, pairs


def pairs_of(graph):
    ids = [node.id for node in graph.nodes]
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True)
    return {(ids[s], ids[t]) for s, t in ends}


def test_influence_by_hand():
    graph = small()
    at = {n.id: v for n, v in zip(graph.nodes, graph.influence.tolist(), strict=True)}
    assert at == {
        "feature.0.7.1": 0.5, "error.0.1": 0.125, "error.1.1": 0.5, "embedding.1": 0.375,
        "bias.0": 0.0, "target.0": 1.0,
    }  # fmt: skip
    assert graph.influence.dtype == torch.float64


def test_scores_by_hand():
    found = graph_scores(small())
    assert found.replacement == pytest.approx(0.375 / (0.375 + 0.625), abs=1e-15)
    # All of 2.5 of influence, of which a half of the target's and a quarter of the feature's half
    # come from errors.
    assert found.completeness == pytest.approx(1 - (0.5 * 1 + 0.25 * 0.5) / 2.5, abs=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
def test_influence_and_scores_are_those_of_the_dense_rules(seed):
    graph = random_graph(seed)
    matrix, starts = dense(graph), graph.starts()
    found = reached(matrix, starts)
    torch.testing.assert_close(graph.influence, found + starts, rtol=1e-12, atol=1e-15)
    error, token = graph.kinds(Kind.ERROR), graph.kinds(Kind.EMBEDDING)
    at = found + starts
    whole = (1 - shares(matrix)[:, error].sum(1)) * at
    assert graph.scores.replacement == pytest.approx(
        (found[token].sum() / (found[token].sum() + found[error].sum())).item(), rel=1e-12
    )
    assert graph.scores.completeness == pytest.approx((whole.sum() / at.sum()).item(), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_errors_all_is_explained(seed):
    graph = random_graph(seed)
    keep = ~graph.kinds(Kind.ERROR)
    without = graph.part(keep, torch.ones(len(graph.edges), dtype=torch.bool))
    found = graph_scores(without)
    assert (found.replacement, found.completeness) == (1.0, 1.0)
    assert graph.scores.replacement < 1
    assert graph.scores.completeness < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_what_begins_at_the_targets_arrives_at_leaves(seed):
    graph = random_graph(seed)
    fed = torch.zeros(len(graph.nodes), dtype=torch.bool)
    fed[graph.edges.target[~graph.kinds(*CONSTANTS)[graph.edges.source.long()]].long()] = True
    assert graph.influence[~fed].sum().item() == pytest.approx(1.0, abs=1e-12)


def test_constants_change_neither_influence_nor_scores():
    graph = random_graph(3)
    constants = graph.kinds(*CONSTANTS)
    edges = graph.edges
    louder = torch.where(constants[edges.source.long()], 1e6, 1.0)
    loud = graph_with(graph, edges=Edges(edges.source, edges.target, edges.weight * louder))
    assert torch.equal(influence(loud.edges, constants, loud.starts()), graph.influence)
    assert graph_scores(loud) == graph.scores


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.5, 0.7), (0.95, 0.9), (0.0, 0.5)])
def test_pruning_is_that_of_the_dense_rules(seed, nodes, edges):
    graph = random_graph(seed, n_features=20)
    part = pruned(graph, nodes=nodes, edges=edges)
    ids, pairs = slowly_pruned(graph, nodes, edges)
    constants = {node.id for node in graph.nodes if node.kind in CONSTANTS}
    assert {node.id for node in part.nodes} - constants == ids
    assert {pair for pair in pairs_of(part) if pair[0] not in constants} == pairs


@pytest.mark.parametrize("seed", SEEDS)
def test_pruning_keeps_the_books_closed(seed):
    graph = random_graph(seed, n_features=20)
    part = pruned(graph)
    assert closes(graph)
    assert closes(part)
    assert len(part.edges) < len(graph.edges)
    assert part.scores == graph.scores
    whole = dict(zip((n.id for n in graph.nodes), graph.influence.tolist(), strict=True))
    assert part.influence.tolist() == [whole[node.id] for node in part.nodes]


def test_the_books_noticed_if_an_edge_were_lost():
    graph = random_graph(0)
    lost = graph.edges.only(torch.arange(len(graph.edges)) > 0)
    assert not closes(graph_with(graph, edges=lost))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_share_of_one_keeps_all_that_has_influence(seed):
    graph = random_graph(seed)
    part = pruned(graph, nodes=1, edges=1)
    stays = {n.id for n, v in zip(graph.nodes, graph.influence.tolist(), strict=True) if v > 0}
    own = {n.id for n in part.nodes if n.kind not in (*CONSTANTS, Kind.EMBEDDING)}
    assert own == {one for one in stays if not one.startswith("embedding")} - {
        n.id for n in graph.nodes if n.kind is Kind.FEATURE and not _fed(graph, n)
    }


def _fed(graph, node):
    into = graph.edges.source[graph.edges.target == graph.place(node.id)].long()
    return bool((~graph.kinds(*CONSTANTS)[into]).any())


def test_pruning_more_leaves_less_and_pins_stay():
    graph = random_graph(5, n_features=30)
    sizes = [len(pruned(graph, nodes=s).nodes) for s in (1, 0.8, 0.5, 0.1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    part = pruned(graph, nodes=0.1)
    lost = next(n.id for n in graph.nodes if n.kind is Kind.FEATURE and n.id not in part.places)
    kept = pruned(graph_with(graph, pinned=(lost,)), nodes=0.1)
    assert lost in kept.places
    assert kept.pinned == (lost,)


def test_an_edge_of_a_constant_stays_where_it_weighs_as_much():
    graph = small()
    assert pairs_of(pruned(graph, nodes=1, edges=1)) == pairs_of(graph)
    quiet = graph.edges.weight.clone()
    quiet[4:] = 1e-6
    edges = Edges(graph.edges.source, graph.edges.target, quiet)
    part = pruned(graph_with(graph, edges=edges), nodes=0.99, edges=0.99)
    assert "bias.0" not in part.places
    assert len(part.edges) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_subgraph_scores_of_all_features_and_of_none(seed):
    graph = random_graph(seed)
    features = [node.id for node in graph.nodes if node.kind is Kind.FEATURE]
    every = subgraph_scores(graph, features)
    assert every.replacement == pytest.approx(graph.scores.replacement, abs=1e-12)
    assert every.completeness == pytest.approx(graph.scores.completeness, abs=1e-12)
    assert subgraph_scores(graph, []).replacement < every.replacement
    some = subgraph_scores(graph, features[::2])
    merged = by_hand_merged(graph, set(features[1::2]))
    assert some.replacement == pytest.approx(merged.replacement, abs=1e-6)
    assert some.completeness == pytest.approx(merged.completeness, abs=1e-6)


def by_hand_merged(graph, gone):
    """The scores after features in `gone` became part of errors, edge by edge."""
    ids = {n.id: n for n in graph.nodes}
    edges = {}
    for s, t, w in zip(graph.edges.source.tolist(), graph.edges.target.tolist(),
                       graph.edges.weight.tolist(), strict=True):  # fmt: skip
        a, b = graph.nodes[s], graph.nodes[t]
        if b.id in gone:
            continue
        if a.id in gone:
            a = ids.setdefault(
                f"error.{a.layer}.{a.position}", Node(Kind.ERROR, a.layer, a.position)
            )
        edges[a.id, b.id] = edges.get((a.id, b.id), 0.0) + w
    return graph_scores(graph_of([n for n in ids.values() if n.id not in gone], edges))


def test_subgraph_scores_make_an_error_where_there_is_none():
    graph = small()
    keep = ~graph.kinds(Kind.ERROR)
    without = graph.part(keep, torch.ones(len(graph.edges), dtype=torch.bool))
    found = subgraph_scores(without, [])
    assert (found.replacement, found.completeness) == (0.0, 0.5)
    with pytest.raises(InputError, match=r"no node feature\.9"):
        subgraph_scores(graph, ["feature.9"])


def test_cumulative_influence_is_small_where_it_matters():
    found = cumulative(torch.tensor([1.0, 5.0, 0.0, 4.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([1.0, 0.5, 1.0, 0.9])


def test_edges_between_the_same_nodes_are_summed():
    edges = Edges(torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2]), torch.tensor([1.0, 2.0, 3.0]))
    found = summed(edges, 3)
    assert (found.source.tolist(), found.target.tolist()) == ([0, 1], [2, 2])
    assert found.weight.tolist() == [4.0, 2.0]


@pytest.mark.parametrize("ends", [((0, 1), (1, 0)), ((0,), (0,))])
def test_a_circle_is_refused(ends):
    edges = Edges(*map(torch.tensor, ends), torch.ones(len(ends[0])))
    with pytest.raises(InputError, match="in a circle: a node leads back to itself"):
        influence(edges, torch.zeros(2, dtype=torch.bool), torch.ones(2))


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="to a share of the influence of its edges, from 0 to 1"):
        pruned(small(), edges=share)
