"""Figures of graphs."""

import re
import xml.etree.ElementTree as ET

import pytest
from circuits_graphs import random_graph
from PIL import Image

from gemscope.circuits._graph import Kind
from gemscope.circuits._groups import group, rename
from gemscope.circuits._influence import pruned
from gemscope.circuits._picture import MOST, NEGATIVE, POSITIVE, draw
from gemscope.errors import InputError


def texts(file):
    """What an SVG says: matplotlib writes each text as a comment, and as outlines."""
    return re.findall(r"<!-- (.*?) -->", file.read_text())


@pytest.fixture(scope="module")
def graph():
    graph = pruned(random_graph(1, n_layers=4, n_positions=6, n_features=20), nodes=0.7, edges=0.9)
    own = [node.id for node in graph.nodes if node.kind is Kind.FEATURE]
    graph = group(graph, "names & <of> $functions$", own[:3])
    return rename(graph, own[4], "</svg><script>alert(1)</script> --> end")


@pytest.fixture(scope="module")
def drawn(graph, tmp_path_factory):
    return draw(graph, tmp_path_factory.mktemp("p") / "graph.svg")


def test_an_svg_says_what_the_graph_says(graph, drawn):
    said = " ".join(texts(drawn))
    assert "def add(a, b): return a +" in said
    assert f"replacement {graph.scores.replacement:.2f}" in said
    assert "(3 nodes)" in said
    for word in ("layer 0", "targets", "tokens", "adds", "takes away", "feature", "error"):
        assert word in said
    colours = drawn.read_text().lower()
    assert POSITIVE.lower() in colours
    assert NEGATIVE.lower() in colours


def test_text_of_strangers_stays_text(drawn):
    tree = ET.parse(drawn)
    assert not [one for one in tree.iter() if one.tag.endswith("script")]
    assert "<script" not in re.sub(r"<!--.*?-->", "", drawn.read_text(), flags=re.DOTALL)


def test_the_same_graph_gives_the_same_bytes(graph, drawn, tmp_path):
    assert draw(graph, tmp_path / "again.svg").read_bytes() == drawn.read_bytes()


@pytest.mark.parametrize(("features", "positions"), [(1, 2), (60, 6)])
def test_small_and_large_graphs_are_drawn(features, positions, tmp_path):
    graph = random_graph(3, n_layers=4, n_positions=positions, n_features=features)
    file = draw(graph, tmp_path / "graph.png")
    with Image.open(file) as image:
        assert image.width >= 900
        assert len(image.convert("RGB").getcolors(2**20)) > 50
    svg = " ".join(texts(draw(graph, tmp_path / "graph.svg")))
    shown, many = map(int, re.search(r"(\d+) of (\d+) nodes", svg).groups())
    assert shown <= min(many, MOST)
    assert shown >= min(many - 1, MOST)


def test_what_cannot_be_drawn_is_refused(graph, tmp_path):
    with pytest.raises(InputError, match=r"written as \.svg, \.png or \.pdf"):
        draw(graph, tmp_path / "graph.gif")
    with pytest.raises(InputError, match="there is no folder"):
        draw(graph, tmp_path / "none" / "graph.svg")
