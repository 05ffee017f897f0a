"""Graphs to and from the JSON of circuit-tracer.

`golden/circuit_tracer_graph.json` was written by `create_graph_files` of circuit-tracer 0.5.0 from
random weights; layer 0 has features 1 and 2 active where layers 1 and 2 have errors.
"""

import copy
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from circuits_graphs import graph_of, graph_with, random_graph
from damage import ANCHORS, KINDS, WRONG, at_most, damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.circuits._exchange import INDEX, cantor, export_graph
from gemscope.circuits._exchange_in import import_graph, uncantor
from gemscope.circuits._files import load_graph, save_graph
from gemscope.circuits._graph import CONSTANTS, Group, Kind, Node
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")

GOLDEN = Path(__file__).parent / "golden" / "circuit_tracer_graph.json"


def weights(graph):
    ids = [node.id for node in graph.nodes]
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(),
               graph.edges.weight.tolist(), strict=True)  # fmt: skip
    return {(ids[s], ids[t]): w for s, t, w in ends}


def colliding():
    """The error of layer 1 and feature 1 of layer 0, at the same position."""
    nodes = [
        Node(Kind.FEATURE, 0, 1, 1, 2.0), Node(Kind.FEATURE, 2, 1, 7, 4.0), Node(Kind.ERROR, 1, 1),
        Node(Kind.ERROR, 0, 1), Node(Kind.EMBEDDING, position=1), Node(Kind.BIAS, 0),
        Node(Kind.TARGET, number=0),
    ]  # fmt: skip
    pairs = [("embedding.1", "feature.0.1.1"), ("feature.0.1.1", "feature.2.7.1"),
             ("error.1.1", "feature.2.7.1"), ("error.0.1", "target.0"),
             ("feature.2.7.1", "target.0"), ("bias.0", "target.0")]  # fmt: skip
    return graph_of(nodes, {pair: float(n + 1) for n, pair in enumerate(pairs)})


def test_cantor_numbers():
    assert cantor(0, 5) == 20
    assert cantor(20, 15589) == 121_843_834
    for pair in ((0, 0), (3, 0), (0, 3), (41, 1_048_575), (2**30, 2**29)):
        assert uncantor(cantor(*pair)) == pair


def test_a_file_of_circuit_tracer_is_read():
    graph, said = import_graph(GOLDEN), json.loads(GOLDEN.read_text())
    types = [one["feature_type"] for one in said["nodes"]]
    assert [str(node.kind) for node in graph.nodes] == [
        {"cross layer transcoder": "feature", "embedding": "embedding", "logit": "target"}.get(
            one, "error"
        )
        for one in types
    ]
    assert "feature.1.15589.3" in graph.places
    assert {"feature.0.2.3", "error.2.3", "feature.0.1.2", "error.1.2"} <= set(graph.places)
    assert graph.tokens == ("<bos>", "def", "·add", "(")
    assert graph.token_ids == (2, 3, 4, 5)
    assert [(t.label, t.token, t.position) for t in graph.targets] == [("·a", 10, 3), ("⏎", 11, 3)]
    assert [t.weight for t in graph.targets] == pytest.approx([0.75, 0.25])
    assert graph.dictionaries == tuple(f"me/transcoder-{n}" for n in range(3))
    assert graph.settings["from"] == "circuit-tracer"
    assert 0 < graph.scores.replacement < 1


def test_links_of_an_id_of_two_go_to_whom_they_can_belong():
    graph, said = import_graph(GOLDEN), json.loads(GOLDEN.read_text())
    assert len(graph.edges) == len(said["links"]) - 1
    assert graph.settings["notes"] == [
        "1 links are left out: they could be of a feature or of an error, "
        "which the file calls alike"
    ]
    found = weights(graph)
    double = [
        one["weight"]
        for one in said["links"]
        if (one["source"], one["target"]) == ("0_1_2", "4_10_3")
    ]
    assert len(double) == 2
    pair = [found["feature.0.1.2", "target.0"], found["error.1.2", "target.0"]]
    assert pair == pytest.approx(double)
    assert not any(t == "error.1.2" for _, t in found)


def test_the_books_of_what_was_read_say_what_is_not_shown():
    graph = import_graph(GOLDEN)
    shown = torch.zeros_like(graph.books.value)
    shown.index_add_(0, graph.edges.target.long(), graph.edges.weight.double())
    rest = graph.books.value - shown
    torch.testing.assert_close(graph.books.remainder, rest, equal_nan=True)
    for place, node in enumerate(graph.nodes):
        value = graph.books.value[place].item()
        assert value == node.activation if node.kind is Kind.FEATURE else math.isnan(value)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_exported_is_read(seed, tmp_path):
    graph = random_graph(seed)
    a, b, c = [node.id for node in graph.nodes][:3]
    graph = graph_with(graph, groups=(Group("two", (a, b)),), pinned=(c,), labels={a: "first <b>"})
    made = export_graph(graph, tmp_path / "My graph.json")
    assert any("biases and of MLPs at BOS are left out" in note for note in made.notes)
    read = import_graph(made.file)
    constants = {n.id for n in graph.nodes if n.kind in CONSTANTS}
    assert set(read.places) == set(graph.places) - constants
    expected = {pair: w for pair, w in weights(graph).items() if pair[0] not in constants}
    assert weights(read) == pytest.approx(expected)
    assert (read.groups, read.labels) == (graph.groups, graph.labels)
    assert set(read.pinned) == {a, b, c}
    assert (read.model, read.dictionaries) == (graph.model, graph.dictionaries)
    assert read.token_ids == graph.token_ids
    assert [t.label for t in read.targets] == ["·return", "·a"]
    assert read.scores.replacement == pytest.approx(graph.scores.replacement, abs=1e-6)
    assert load_graph(save_graph(read, tmp_path / "r.safetensors")).nodes == read.nodes


def test_an_errors_id_is_never_that_of_a_feature(tmp_path):
    made = export_graph(colliding(), tmp_path / "g.json")
    said = json.loads(made.file.read_text())
    ids = [node["node_id"] for node in said["nodes"]]
    assert ids[:4] == ["0_1_1", "2_7_1", "error_1_1", "0_0_1"]
    assert len(set(ids)) == len(ids)
    assert len({n["jsNodeId"] for n in said["nodes"]}) == len(ids)
    assert made.notes[0].startswith("1 errors are called error_LAYER_POSITION")
    read = weights(import_graph(made.file))
    assert read["error.1.1", "feature.2.7.1"] == 3.0
    assert read["feature.0.1.1", "feature.2.7.1"] == 2.0


def test_every_field_that_circuit_tracer_writes_is_there(tmp_path):
    theirs = json.loads(GOLDEN.read_text())
    ours = json.loads(export_graph(random_graph(1), tmp_path / "g.json").file.read_text())
    assert theirs.keys() <= ours.keys()
    for part in ("metadata", "qParams"):
        assert theirs[part].keys() <= ours[part].keys()
    kinds = {one["feature_type"]: one for one in theirs["nodes"]}
    for node in ours["nodes"]:
        model = kinds[node["feature_type"]]
        assert node.keys() == model.keys()
        assert all(type(node[k]) is type(model[k]) for k in model if model[k] is not None)
    assert [n["is_target_logit"] for n in ours["nodes"]][-2:] == [True, False]


def test_influence_is_the_share_of_those_above(tmp_path):
    graph = random_graph(2)
    nodes = json.loads(export_graph(graph, tmp_path / "g.json").file.read_text())["nodes"]
    at = {n["node_id"]: n["influence"] for n in nodes if n["feature_type"] != "logit"}
    order = sorted(at, key=at.__getitem__)
    top = max((n for n in graph.nodes if n.kind is not Kind.TARGET),
              key=lambda n: graph.influence[graph.place(n.id)].item())  # fmt: skip
    total = sum(
        v for n, v in zip(graph.nodes, graph.influence.tolist(), strict=True)
        if n.kind is not Kind.TARGET
    )  # fmt: skip
    assert at[order[0]] == pytest.approx(graph.influence[graph.place(top.id)].item() / total)
    assert max(at.values()) == pytest.approx(1.0)


def test_names_are_the_same_in_every_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from circuits_graphs import random_graph; "
        "from gemscope.circuits._exchange import export_graph; "
        f"export_graph(random_graph(1), '{tmp_path}/other.json')"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONHASHSEED": "7"})
    here = json.loads(export_graph(random_graph(1), tmp_path / "here.json").file.read_text())
    there = json.loads((tmp_path / "other.json").read_text())
    there["metadata"]["slug"] = "here"
    assert here == there


def test_the_index_of_a_folder_lists_each_graph_once(tmp_path):
    for name in ("one.json", "two.json", "one.json"):
        export_graph(random_graph(1), tmp_path / name, index=True)
    listed = json.loads((tmp_path / INDEX).read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["two", "one"]
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match="is no index of graphs"):
        export_graph(random_graph(1), tmp_path / "a.json", index=True)
    for name in ("graph.pt", INDEX):
        with pytest.raises(InputError, match=r"is written as NAME\.json"):
            export_graph(random_graph(1), tmp_path / name)


def test_kinds_that_are_not_known_are_left_out_and_said(tmp_path):
    said = json.loads(GOLDEN.read_text())
    said["nodes"].append(dict(said["nodes"][0], node_id="9_9_1", feature_type="lorsa"))
    said["links"].append({"source": "9_9_1", "target": "4_10_3", "weight": 1.0})
    (tmp_path / "g.json").write_text(json.dumps(said))
    graph = import_graph(tmp_path / "g.json")
    assert "1 nodes of kinds that are not known are left out" in graph.settings["notes"]
    assert len(graph.edges) == len(import_graph(GOLDEN).edges)


def link(**change):
    return lambda s: s["links"][0].update(change)


def node(at, **change):
    return lambda s: s["nodes"][at].update(change)


WRONG_FILES = {
    "lacks metadata, nodes or links": lambda s: s.pop("links"),
    "has no tokens": lambda s: s["metadata"].update(prompt_tokens=[]),
    "ctx_idx of .* is no number from 0 to 3": node(0, ctx_idx=4),
    "says another layer than its node": node(0, layer="2"),
    "the layer of .* is 'x', and not a number": node(0, layer="x"),
    "neither the id nor the number": node(0, node_id="a", feature=4),
    "it has a node twice": lambda s: s["nodes"].append(copy.deepcopy(s["nodes"][0])),
    "no logit to explain": lambda s: s.update(nodes=[], links=[]),
    "token_prob of .* is 2": node(-1, token_prob=2),
    "a link of nobody, which it has no node for": link(source="nobody"),
    "the weight of .* is no number": link(weight=None),
    "which nothing comes into": link(target="E_2_0"),
    "cannot lead to": link(source="4_10_3"),
    "is there twice": lambda s: s["links"].append(s["links"][0]),
    "Infinity is no number of JSON": link(weight=math.inf),
    "node_id is no text": node(0, node_id=5),
}


@pytest.mark.parametrize("why", WRONG_FILES)
def test_what_cannot_be_is_refused(why, tmp_path):
    said = json.loads(GOLDEN.read_text())
    WRONG_FILES[why](said)
    (tmp_path / "g.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=why):
        import_graph(tmp_path / "g.json")


def examined(raw):
    with tempfile.TemporaryDirectory() as made, at_most(20):
        file = Path(made) / "g.json"
        file.write_bytes(raw)
        try:
            graph, told = import_graph(file), None
        except InputError as error:
            told = str(error)
        if told is not None:
            assert told.isprintable(), repr(told)
            assert len(told) < 2_000
            return False
        json.dumps(graph.json(), allow_nan=False).encode()
        load_graph(save_graph(graph, Path(made) / "g.safetensors"))
        return True


@pytest.mark.parametrize("times", [150, pytest.param(800, marks=pytest.mark.slow)])
def test_damage_is_refused_or_read(times):
    good = GOLDEN.read_bytes()
    assert examined(good)
    numbers = st.integers(0, 2**34)

    @settings(deadline=None, max_examples=times, derandomize=times < 1_000)
    @given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(ANCHORS), numbers, numbers),
                    min_size=1, max_size=3))  # fmt: skip
    def examine(damage):
        examined(damaged(good, damage))

    examine()


def test_values_of_every_kind_in_every_place():
    said = json.loads(GOLDEN.read_text())
    said["qParams"] |= {"supernodes": [["a", "0_2_1"]], "pinnedIds": ["0_2_1"]}
    parts = [said["metadata"], said["qParams"], said["nodes"][0], said["nodes"][-1],
             said["links"][0], said["qParams"]["supernodes"]]  # fmt: skip
    for part in parts:
        for number, key in enumerate(part if isinstance(part, dict) else range(len(part))):
            kept = part[key]
            for value in WRONG[number % 3 :: 3]:
                part[key] = value
                examined(json.dumps(said).encode())
            part[key] = kept
