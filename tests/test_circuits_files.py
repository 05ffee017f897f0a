"""Graphs in files: what is written is read, and what is damaged is refused in a sentence."""

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from circuits_graphs import graph_with, random_graph
from damage import ANCHORS, KINDS, WRONG, at_most, damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from gemscope.circuits._files import load_graph, save_graph
from gemscope.circuits._graph import Group
from gemscope.circuits._influence import pruned
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")

KEY = "gemscope.graph"


def full(seed=0):
    """A pruned graph that says all that a graph can."""
    graph = pruned(random_graph(seed))
    a, b, c = [node.id for node in graph.nodes][:3]
    edge = {"source": a, "target": b, "predicted": 1.0, "frozen": 1.1, "model": 0.9}
    node = {"id": a, "target": "target.0", "predicted": 1.0, "frozen": 1.0, "model": None}
    agreement = {"pearson": None, "same_sign": 1.0, "n": 1}
    share = {"share": 0.5, "low": 0.2, "high": 0.8}
    return graph_with(
        graph, groups=(Group("names ⏎ of <b>", (a, b)),), pinned=(c,),
        labels={a: "named", "miniature/transcoder-0/width-1k/7": "tab\tand 名"},
        checked={"step": 0.1, "edges": [edge], "nodes": [node],
                 "agreement": {"frozen": agreement, "model": agreement}},
        stability={"prompts": ["x"], "nodes": [{"key": "k", "id": a, **share}],
                   "edges": [{"source": "k", "target": "l", **share}],
                   "jaccard": {"nodes": {"mean": 0.5, "low": 0.1, "high": 0.9}}},
    )  # fmt: skip


def assert_same(one, other):
    for name in ("source", "target", "weight"):
        assert torch.equal(getattr(one.edges, name), getattr(other.edges, name)), name
    for mine, theirs in ((one.books.value, other.books.value), (one.influence, other.influence),
                         (one.books.remainder, other.books.remainder)):  # fmt: skip
        assert torch.equal(mine.nan_to_num(-1e9), theirs.nan_to_num(-1e9))
        assert mine.dtype == theirs.dtype == torch.float64
    for name in ("prompt", "tokens", "token_ids", "model", "dictionaries", "nodes", "targets",
                 "scores", "labels", "groups", "pinned", "settings", "checked",
                 "stability"):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    assert (one.books.error, one.books.tolerance) == (other.books.error, other.books.tolerance)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_graph(full(), tmp_path_factory.mktemp("g") / "g.safetensors").read_bytes()


def with_said(raw, change):
    """The file with its JSON changed."""
    said = json.loads(json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"][KEY])
    change(said)
    return save(load(raw), {KEY: json.dumps(said)})


def with_column(raw, name, change):
    """The file with one tensor changed."""
    text = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"][KEY]
    columns = load(raw)
    return save(columns | {name: change(columns[name].clone())}, {KEY: text})


def put(value, place=0):
    def change(column):
        column[place] = value
        return column

    return change


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read(seed, tmp_path):
    graph = full(seed)
    file = save_graph(graph, tmp_path / "a graph.safetensors")
    assert_same(load_graph(file), graph)
    assert list(tmp_path.iterdir()) == [file]
    before = file.read_bytes()
    assert save_graph(load_graph(file), file).read_bytes() == before


def test_a_file_is_read_in_three_lines_without_us(good):
    said = json.loads(
        json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])["__metadata__"][KEY]
    )
    columns = load(good)
    assert said["version"] == 1
    assert columns["edge.weight"].dtype == torch.float32
    assert len(columns["node.kind"]) == len(full().nodes)


WRONG_JSON = {
    "of version 2, and this gemscope reads graphs up to version 1": lambda s: s.update(version=2),
    "does not say its version": lambda s: s.pop("version"),
    r"targets\.0\.weight: input should be a valid": lambda s: s["targets"][0].update(weight="1"),
    r"targets\.0\.weight: input should be less": lambda s: s["targets"][0].update(weight=1.5),
    "prompt: field required": lambda s: s.pop("prompt"),
    "more: extra inputs are not permitted": lambda s: s.update(more=1),
    "a target at a position past its tokens": lambda s: s["targets"][0].update(position=99),
    "5 tokens, and ids of 4": lambda s: s["token_ids"].pop(),
    "a layer that it names no dictionary for": lambda s: s.update(dictionaries=[]),
    "it groups nodes twice": lambda s: s["groups"].append(s["groups"][0]),
    "it pins nodes twice, or nodes that it has not": lambda s: s.update(pinned=["feature.9.9.9"]),
    "a number that there is not": lambda s: s["targets"].pop(),
    "labels.*at most 2000 characters": lambda s: s["labels"].update(a="x" * 9_000),
    r"checked\.edges\.0\.predicted": lambda s: s["checked"]["edges"][0].update(predicted=None),
    r"stability\.nodes\.0\.share": lambda s: s["stability"]["nodes"][0].update(share=7),
    "NaN is no number of JSON": lambda s: s.update(settings={"a": float("nan")}),
    "half a character": lambda s: s.update(prompt="\ud800"),
    "nested too deeply": lambda s: s.update(settings={"a": json.loads("[" * 90 + "]" * 90)}),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG_JSON)
def test_json_that_cannot_be_is_refused(why, good, tmp_path):
    file = tmp_path / "g.safetensors"
    file.write_bytes(with_said(good, WRONG_JSON[why]))
    with pytest.raises(InputError, match=why) as told:
        load_graph(file)
    assert str(told.value).isprintable()


WRONG_COLUMNS = {
    "edges of nodes that it has not": ("edge.source", put(10_000)),
    "an edge twice": ("edge.source", lambda c: c * 0 + c[0]),
    "weights are not finite": ("edge.weight", put(float("inf"))),
    "books do not close": ("edge.weight", lambda c: c + 1),
    "of a kind that there is not": ("node.kind", put(6)),
    "a position that there is not": ("node.position", put(5)),
    "a layer that there is not": ("node.layer", put(-1)),
    "a feature that there is not": ("node.feature", put(-7)),
    "activations are not finite": ("node.activation", put(float("nan"))),
    "influence is not of finite": ("node.influence", put(-0.5)),
    "a value without a remainder": ("node.remainder", put(float("nan"))),
    "a node twice": ("node.feature", lambda c: c.clamp(max=0)),
    "edge from a target, or into what": ("edge.target", lambda c: c * 0 + 20),
    "is F64 of shape": ("edge.weight", lambda c: c.double()),
    r"lacks, or should not have, more": ("more", None),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG_COLUMNS)
def test_columns_that_cannot_be_are_refused(why, good, tmp_path):
    name, change = WRONG_COLUMNS[why]
    file = tmp_path / "g.safetensors"
    if change is None:
        text = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])["__metadata__"][KEY]
        file.write_bytes(save(load(good) | {name: torch.zeros(1)}, {KEY: text}))
    else:
        if name == "edge.target":
            error = next(i for i, n in enumerate(full().nodes) if n.kind == "error")
            raw = with_column(good, name, put(error))
        elif why == "an edge twice":
            raw = with_column(
                with_column(good, name, change), "edge.target", lambda c: c * 0 + c[0]
            )
        elif why == "a node twice":
            raw = good
            for column in ("node.feature", "node.layer", "node.position"):
                raw = with_column(raw, column, lambda c: put(c[0], 1)(c))
        else:
            raw = with_column(good, name, change)
        file.write_bytes(raw)
    with pytest.raises(InputError, match=why):
        load_graph(file)


def test_other_files_are_refused(tmp_path, good):
    file = tmp_path / "g.safetensors"
    for raw, why in ((b"", "not a safetensors file"), (good[:-5], "cut short"),
                     (save({"a": torch.zeros(1)}), "holds no attribution graph")):  # fmt: skip
        file.write_bytes(raw)
        with pytest.raises(InputError, match=why):
            load_graph(file)
    with pytest.raises(InputError, match="cannot be read"):
        load_graph(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        load_graph(tmp_path)
    with pytest.raises(InputError, match=r"written as NAME\.safetensors, not as 'g\.pt'"):
        save_graph(full(), tmp_path / "g.pt")
    with pytest.raises(InputError, match="cannot be written"):
        save_graph(full(), tmp_path / "no" / "g.safetensors")


def test_a_circle_is_refused(good, tmp_path):
    graph = full()
    feature = [i for i, n in enumerate(graph.nodes) if n.kind == "feature"]
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True)
    s, t = next((s, t) for s, t in ends if s in feature and t in feature)
    raw = with_column(good, "edge.source", lambda c: torch.cat([c, torch.tensor([t]).int()]))
    raw = with_column(raw, "edge.target", lambda c: torch.cat([c, torch.tensor([s]).int()]))
    raw = with_column(raw, "edge.weight", lambda c: torch.cat([c, torch.tensor([1e-9])]))
    file = tmp_path / "g.safetensors"
    file.write_bytes(raw)
    with pytest.raises(InputError, match="goes round in a circle"):
        load_graph(file)


def examined(raw):
    """Whether a file is read; what is read can be said and written anew."""
    with tempfile.TemporaryDirectory() as made, at_most(20):
        file = Path(made) / "g.safetensors"
        file.write_bytes(raw)
        try:
            graph = load_graph(file)
        except InputError as error:
            told = str(error)
        else:
            told = None
        if told is not None:
            assert told.isprintable(), repr(told)
            assert len(told) < 2_000
            return False
        json.dumps(graph.json(), allow_nan=False).encode()
        assert_same(load_graph(save_graph(graph, Path(made) / "h.safetensors")), graph)
        return True


DAMAGE = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(ANCHORS), st.integers(0, 2**34),
              st.integers(0, 2**34)), min_size=1, max_size=3,
)  # fmt: skip
TIMES = [150, pytest.param(800, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", TIMES)
def test_damaged_bytes_are_refused_or_read(times, good):
    assert examined(good)

    @settings(deadline=None, max_examples=times, derandomize=times < 1_000)
    @given(DAMAGE)
    def examine(damage):
        examined(damaged(good, damage))

    examine()


@pytest.mark.parametrize("times", TIMES)
def test_damaged_json_is_refused_or_read(times, good):
    def spoilt(said, place, value):
        level, places = [said], []
        while level:
            inner = [(x, k) for x in level for k in (x if isinstance(x, dict) else range(len(x)))]
            places += inner
            level = [x[k] for x, k in inner if isinstance(x[k], dict | list)]
        where, key = places[place % len(places)]
        where[key] = WRONG[value % len(WRONG)]

    @settings(deadline=None, max_examples=times, derandomize=times < 1_000)
    @given(st.integers(0, 2**20), st.integers(0, 2**20))
    def examine(place, value):
        examined(with_said(good, lambda said: spoilt(said, place, value)))

    examine()
