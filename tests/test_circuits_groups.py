"""Groups, names and pins; and the strongest paths."""

import itertools

import pytest
import torch
from circuits_graphs import graph_of, graph_with, random_graph

from gemscope.circuits._graph import CONSTANTS, Group, Kind, Node
from gemscope.circuits._groups import (
    group,
    merged,
    pin,
    propose,
    rename,
    similarities,
    ungroup,
    unpin,
)
from gemscope.circuits._paths import strongest_paths
from gemscope.errors import InputError


def features(graph):
    return [node.id for node in graph.nodes if node.kind is Kind.FEATURE]


def closes(one):
    shown = torch.zeros_like(one.value).index_add_(0, one.edges.target.long(), one.edges.weight)
    gap = (shown + one.remainder - one.value)[~one.value.isnan()].abs()
    return bool((gap < 1e-9).all()) and len(gap) > 0


@pytest.mark.parametrize("seed", range(8))
def test_books_of_groups_close(seed):
    graph = random_graph(seed)
    own = features(graph)
    errors = [node.id for node in graph.nodes if node.kind is Kind.ERROR]
    graph = group(graph, "all ways", own[::3])
    graph = group(graph, "with an error", [own[1], errors[0]])
    one = merged(graph)
    assert closes(one)
    assert sorted(i for ids in one.members for i in ids) == sorted(graph.places)
    assert len(one.labels) == len(graph.nodes) - len(own[::3]) + 1 - 1
    assert not (one.edges.source == one.edges.target).any()


def test_a_groups_value_is_its_members_less_what_they_give_each_other():
    nodes = [
        Node(Kind.EMBEDDING, position=1), Node(Kind.FEATURE, 0, 1, 1), Node(Kind.FEATURE, 1, 1, 2),
        Node(Kind.TARGET, number=0),
    ]  # fmt: skip
    edges = {("embedding.1", "feature.0.1.1"): 2.0, ("feature.0.1.1", "feature.1.2.1"): 3.0,
             ("embedding.1", "feature.1.2.1"): 0.5, ("feature.0.1.1", "target.0"): 4.0,
             ("feature.1.2.1", "target.0"): -1.0}  # fmt: skip
    one = merged(group(graph_of(nodes, edges), "both", ["feature.0.1.1", "feature.1.2.1"]))
    assert one.labels == ("token def", "both", " return")
    assert one.value.tolist()[1:] == [2.5, 3.0]
    ends = [one.edges.source.tolist(), one.edges.target.tolist(), one.edges.weight.tolist()]
    assert list(zip(*ends, strict=True)) == [(0, 1, 2.5), (1, 2, 3.0)]


def test_without_groups_nothing_changes():
    graph = random_graph(1)
    one = merged(graph)
    assert one.members == tuple((node.id,) for node in graph.nodes)
    assert torch.equal(one.value.nan_to_num(-1), graph.books.value.nan_to_num(-1))
    assert len(one.edges) == len(graph.edges)


def test_a_node_is_in_one_group():
    graph = random_graph(1)
    a, b, c, *_ = features(graph)
    graph = group(graph, "first", [a, b, a])
    graph = group(graph, "second", [b, c])
    assert graph.groups == (Group("first", (a,)), Group("second", (b, c)))
    assert group(graph, "third", [a]).groups[0].label == "second"
    assert ungroup(graph, "first").groups == (Group("second", (b, c)),)
    for label, ids, why in (("", [a], "1 to 500 characters"), ("x\ny", [a], "one line"),
                            ("x", [], "at least one node"), ("x", ["nobody"], "no node nobody"),
                            ("x", ["target.0"], "every path ends at"),
                            ("second", [a], "there is a group 'second'")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            group(graph, label, ids)
    with pytest.raises(InputError, match="no group 'secnd'; nearest: second"):
        ungroup(graph, "secnd")


def test_names_and_pins():
    graph = random_graph(1)
    node = graph.nodes[0]
    named = rename(graph, node.id, "  opening  ")
    assert named.label(node) == "opening"
    assert rename(named, node.id, "").labels == {}
    assert pin(pin(graph, node.id), node.id).pinned == (node.id,)
    assert unpin(pin(graph, node.id), node.id).pinned == ()
    with pytest.raises(InputError, match="is not pinned; pinned are none"):
        unpin(graph, node.id)


def many():
    """Six features at one place: two that share words, two a context, two a direction."""
    nodes = [Node(Kind.FEATURE, 0, 1, n, 1.0) for n in range(6)]
    nodes += [Node(Kind.EMBEDDING, position=p) for p in range(6)]
    nodes += [Node(Kind.TARGET, number=n) for n in range(6)]
    edges = {(f"embedding.{n}", f"feature.0.{n}.1"): 1.0 for n in range(6)}
    edges |= {(f"feature.0.{n}.1", f"target.{n}"): 1.0 for n in range(6)}
    graph = graph_of(nodes, edges)
    names = [graph.address(node) for node in nodes[:6]]
    graph = graph_with(
        graph, labels={names[0]: "names of functions", names[1]: "functions and names"}
    )
    contexts = {names[2]: {1, 2, 3}, names[3]: {1, 2, 3}}
    directions = {names[4]: torch.tensor([1.0, 0.0]), names[5]: torch.tensor([0.9, 0.1])}
    return graph, directions, contexts


def test_features_that_are_alike_are_proposed_as_groups():
    graph, directions, contexts = many()
    # Mean of connections, which have nothing in common, and of what is known.
    found = propose(graph, directions=directions, contexts=contexts, threshold=0.45)
    assert sorted(g.ids for g in found) == [
        ("feature.0.0.1", "feature.0.1.1"), ("feature.0.2.1", "feature.0.3.1"),
        ("feature.0.4.1", "feature.0.5.1"),
    ]  # fmt: skip
    assert "functions names" in [g.label for g in found]
    assert graph.groups == ()
    assert propose(graph, directions=directions, contexts=contexts, threshold=0.6) == ()
    taken = group(graph, "mine", ["feature.0.0.1"])
    rest = propose(taken, directions=directions, contexts=contexts, threshold=0.45)
    assert len(rest) == 2


def test_features_with_the_same_connections_are_alike():
    nodes = [Node(Kind.FEATURE, 0, 1, n, 1.0) for n in range(3)]
    nodes += [Node(Kind.EMBEDDING, position=p) for p in (0, 1)] + [Node(Kind.TARGET, number=0)]
    edges = {(f"embedding.{max(n - 1, 0)}", f"feature.0.{n}.1"): 1.0 + n for n in range(3)}
    edges |= {(f"feature.0.{n}.1", "target.0"): [1.0, 2.0, -2.0][n] for n in range(3)}
    graph = graph_of(nodes, edges)
    alike = similarities(graph, [0, 1, 2], {}, {})
    torch.testing.assert_close(alike, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert [g.ids for g in propose(graph)] == [("feature.0.0.1", "feature.0.1.1")]


def test_proposals_from_what_cannot_be_are_refused():
    graph, directions, _ = many()
    with pytest.raises(InputError, match="between 0 and 1"):
        propose(graph, threshold=1)
    with pytest.raises(InputError, match="of different lengths"):
        propose(graph, directions=directions | {next(iter(directions)): torch.ones(3)})


def every_path(graph):
    """All paths from sources to targets with their shares, one by one."""
    constants = graph.kinds(*CONSTANTS).tolist()
    into = {place: {} for place in range(len(graph.nodes))}
    for s, t, w in zip(graph.edges.source.tolist(), graph.edges.target.tolist(),
                       graph.edges.weight.tolist(), strict=True):  # fmt: skip
        if not constants[s]:
            into[t][s] = w

    def walk(places, share):
        first = into[places[0]]
        if not first:
            return [(share, tuple(graph.nodes[p].id for p in places))]
        total = sum(map(abs, first.values()))
        return list(itertools.chain.from_iterable(
            walk((s, *places), share * abs(w) / total) for s, w in first.items()
        ))  # fmt: skip

    starts = graph.starts().tolist()
    return [one for p, s in enumerate(starts) if s for one in walk((p,), s)]


@pytest.mark.parametrize("seed", range(6))
def test_the_strongest_paths_are_those_of_all_paths(seed):
    graph = random_graph(seed, n_features=8, n_positions=3)
    paths = sorted(every_path(graph), reverse=True)
    assert sum(share for share, _ in paths) == pytest.approx(1.0)
    found = strongest_paths(graph, 12, errors=True)
    assert [one.share for one in found] == pytest.approx([share for share, _ in paths[:12]])
    assert {one.ids for one in found[:8]} == {ids for _, ids in paths[:8]}
    without = [one for one in paths if not one[1][0].startswith("error")]
    own = strongest_paths(graph, 5)
    assert [one.ids for one in own] == [ids for _, ids in without[:5]]


def test_a_path_as_a_sentence():
    nodes = [
        Node(Kind.EMBEDDING, position=1), Node(Kind.FEATURE, 3, 1, 17), Node(Kind.FEATURE, 5, 2, 9),
        Node(Kind.TARGET, number=0),
    ]  # fmt: skip
    pairs = [("embedding.1", "feature.3.17.1"), ("feature.3.17.1", "feature.5.9.2"),
             ("feature.5.9.2", "target.0")]  # fmt: skip
    graph = graph_of(nodes, dict(zip(pairs, (2.0, -0.25, 1.5), strict=True)))
    graph = rename(graph, "feature.3.17.1", "function names")
    (path,) = strongest_paths(graph, 3)
    assert path.sentence == (
        'token "def" (1) → (+2) feature 3.17 "function names" (1) → (-0.25) feature 5.9 (2) '
        '→ (+1.5) " return"'
    )
    assert path.share == 1.0
    assert path.weights == (2.0, -0.25, 1.5)
    with pytest.raises(InputError, match="give at least 1, not 0"):
        strongest_paths(graph, 0)
