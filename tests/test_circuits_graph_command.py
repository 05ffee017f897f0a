"""`gemscope graph`: read, edit, draw and convert a graph."""

import json
import re
import shlex
from pathlib import Path

import pytest
from circuits_graphs import graph_with, random_graph

from gemscope.circuits import load_graph, save_graph
from gemscope.circuits._graph import Group, Kind
from gemscope.circuits._influence import pruned

GOLDEN = Path(__file__).parent / "golden" / "circuit_tracer_graph.json"


@pytest.fixture(scope="module")
def graph():
    graph = pruned(random_graph(1))
    agreement = {"pearson": 0.987, "same_sign": 1.0, "n": 1}
    edge = {"source": graph.nodes[0].id, "target": "target.0", "predicted": 1.0}
    return graph_with(
        graph, labels={graph.nodes[0].id: "evil \x1b[31m[bold]name"},
        checked={"step": 0.1, "edges": [edge], "agreement": {"frozen": agreement}},
        stability={"prompts": ["a", "b"], "jaccard": {"nodes": {"mean": 0.5, "low": 0.25,
                                                               "high": 0.75}}},
    )  # fmt: skip


@pytest.fixture
def kept(graph, tmp_path):
    return save_graph(graph, tmp_path / "graph.safetensors")


def features(graph):
    return [node.id for node in graph.nodes if node.kind is Kind.FEATURE]


def test_what_a_graph_says_in_words(command, kept, graph):
    code, out, _ = command("graph", kept, "--top", 4)
    assert code == 0
    assert "“def add(a, b): return a +”" in out
    assert f"Replacement {graph.scores.replacement:.3f}" in out
    assert "books close to 1e-07 (rounding allows 0.0001)" in out
    assert f"{len(graph.nodes)} nodes (" in out
    assert f"{len(graph.edges)} edges" in out
    assert out.count("→ (") >= 4
    assert '" return"' in out
    top = max((n for n in graph.nodes if n.number is None),
              key=lambda n: graph.influence[graph.place(n.id)])  # fmt: skip
    assert top.id in out
    assert re.search(r"edges, all else held +0\.987 +100\.00% +1\n", out)
    assert "Over 2 prompts, the overlap of graphs (Jaccard) is of nodes 0.5 (0.25 to 0.75)" in out


def test_labels_of_strangers_do_not_act_in_a_terminal(command, kept):
    _, out, _ = command("graph", kept, "--top", 500)
    assert "\x1b" not in out
    assert "[bold]name" in out


def test_a_proposed_label_stays_a_label_in_a_shell(command, tmp_path):
    graph = random_graph(1)
    labels = dict.fromkeys(features(graph), "x'; rm -rf ~; '")
    file = save_graph(graph_with(graph, labels=labels), tmp_path / "g.safetensors")
    _, out, _ = command("graph", file, "--propose-groups")
    lines = [line for line in out.splitlines() if line.startswith("  --group ")]
    assert lines
    assert all(len(shlex.split(line)) == 2 for line in lines)


def test_as_json(command, kept, graph):
    code, out, err = command("graph", kept, "--json", "--propose-groups")
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert {one["id"] for one in said["nodes"]} == set(graph.places)
    assert len(said["edges"]) == len(graph.edges)
    assert said["paths"][0]["nodes"][-1].startswith("target.")
    assert all(len(one["ids"]) > 1 for one in said["proposed"])


def test_edits_are_kept_in_the_file(command, kept, graph):
    a, b, c, *_ = features(graph)
    edits = ["--group", f"a = b={a},{b}", "--rename", f"{c}=my name", "--pin", c]
    assert command("graph", kept, *edits)[0] == 0
    read = load_graph(kept)
    assert read.groups == (Group("a = b", (a, b)),)
    assert read.labels[c] == "my name"
    assert read.pinned == (c,)
    _, out, _ = command("graph", kept)
    assert "Group “a = b”" in out
    assert f"Pinned: {c}" in out
    undone = ["--ungroup", "a = b", "--rename", f"{c}=", "--unpin", c]
    assert command("graph", kept, *undone)[0] == 0
    read = load_graph(kept)
    assert (read.groups, read.labels, read.pinned) == ((), graph.labels, ())


def test_an_edit_that_is_refused_changes_nothing(refused, kept, graph):
    before = kept.read_bytes()
    own = features(graph)[0]
    refused("graph", kept, "--pin", own, "--group", "x=nobody", match="no node nobody")
    refused("graph", kept, "--group", "nothing", match="names no group; write LABEL=ID,ID")
    refused("graph", kept, "--rename", own, match="names no label; write ID=LABEL")
    refused("graph", kept, "--ungroup", "x", match="there is no group 'x'")
    refused("graph", kept, "--unpin", own, match="is not pinned")
    refused("graph", GOLDEN, "--pin", own, match="edits are kept in gemscope's own files")
    assert kept.read_bytes() == before


def test_pruned_drawn_and_converted(command, kept, graph, tmp_path):
    figure, theirs = tmp_path / "graph.svg", tmp_path / "theirs.json"
    code, out, _ = command(
        "graph", kept, "--nodes", 0.5, "--edges", 0.9, "--picture", figure, "--export", theirs,
        "--json",
    )  # fmt: skip
    assert code == 0
    said = json.loads(out)
    assert 0 < len(said["nodes"]) < len(graph.nodes)
    assert any("left out" in note for note in said["notes"])
    assert figure.read_text().startswith("<?xml")
    assert len(load_graph(kept).nodes) == len(graph.nodes)
    back = tmp_path / "back.safetensors"
    code, out, _ = command("graph", theirs, "--export", back)
    assert "nobody knows whether the books close" in out
    assert f"Written: {back}" in out
    assert command("graph", back, "--pin", features(load_graph(back))[0])[0] == 0


def test_a_file_of_circuit_tracer(command):
    code, out, _ = command("graph", GOLDEN, "--top", 50)
    assert code == 0
    assert "Note: 1 links are left out" in out
    assert "feature.0.1.2" in out


def test_bad_files(refused, kept, tmp_path):
    refused("graph", tmp_path / "none.safetensors", match="cannot be read")
    refused("graph", tmp_path / "none.json", match="is no file of at most")
    refused("graph", tmp_path / "graph.pt", match="is no file of a graph: those end in")
    refused("graph", kept, "--picture", tmp_path / "a.gif", match="as .svg, .png or .pdf")
    refused("graph", kept, "--export", tmp_path / "a.pt", match="names no format")
    refused("graph", kept, "--export", kept, match="is the graph that is read")
    refused("graph", kept, "--nodes", 1.5, match="from 0 to 1")
    (tmp_path / "cut.safetensors").write_bytes(kept.read_bytes()[:-9])
    refused("graph", tmp_path / "cut.safetensors", match="cut short or damaged")
