"""How much of a graph returns in those of other prompts, against counting by hand."""

import json

import pytest
from circuits_graphs import TOKENS, graph_of, graph_with

from gemscope.circuits import Kind, Node, trace
from gemscope.circuits._stability import node_key, stability
from gemscope.errors import InputError
from gemscope.relate import wilson

ALL = "miniature/transcoder_all"
PROMPT = "def add(a, b):\n    return a"


def small(features, *, token=1):
    """Features of layer 1 at position 2, each read from one token and leading to the target."""
    nodes = [Node(Kind.FEATURE, 1, 2, f, activation=1.0) for f in features]
    word, goal = Node(Kind.EMBEDDING, position=token), Node(Kind.TARGET, number=0)
    bias = Node(Kind.BIAS, 0)
    edges = {}
    for n in nodes:
        edges |= {(word.id, n.id): 1.0, (n.id, goal.id): 0.5, (bias.id, n.id): 0.1}
    return graph_of([*nodes, word, bias, goal], edges)


@pytest.fixture
def found(miniature):
    """Of a graph with features 3 and 4: three prompts with (3, 9), (9, 4), (9)."""
    others = {"one": small([3, 9]), "two": small([9, 4]), "three": small([9], token=3)}
    asked = []

    def again(prompt, dictionaries, **options):
        asked.append((prompt, dictionaries, options))
        return others[prompt]

    graph = graph_with(small([3, 4]), settings={"targets": ["logit: a"], "node_threshold": 0.5,
                                                "chat": False, "gemscope": "0"})  # fmt: skip
    said = []
    made = stability(graph, miniature, list(others), again=again,
                     progress=lambda *a: said.append(a))  # fmt: skip
    return graph, made.stability, asked, said


def test_shares_are_counted(found):
    graph, made, _, said = found
    shares = {one["key"]: (one["id"], one["share"]) for one in made["nodes"]}
    assert shares == {
        "feature.1.3": ("feature.1.3.2", 1 / 3),
        "feature.1.4": ("feature.1.4.2", 1 / 3),
        f"embedding.{TOKENS[1]}": ("embedding.1", 2 / 3),
        "feature.1.9": (None, 1.0),
    }
    for one in made["nodes"]:
        assert (one["low"], one["high"]) == wilson(round(3 * one["share"]), 3)
    edges = {(one["source"], one["target"]): one["share"] for one in made["edges"]}
    goal, word = f"target.{graph.targets[0].text}", f"embedding.{TOKENS[1]}"
    assert edges == {
        ("feature.1.3", goal): 1 / 3, ("feature.1.4", goal): 1 / 3, ("feature.1.9", goal): 1.0,
        (word, "feature.1.3"): 1 / 3, (word, "feature.1.4"): 1 / 3,
        # In two of three, and not in the graph.
        (word, "feature.1.9"): 2 / 3,
    }  # fmt: skip
    own = next(one for one in made["edges"] if one["source"] == "feature.1.3")
    assert own["id"] == ["feature.1.3.2", "target.0"]
    assert said[-1] == ("prompts", 3, 3)


def test_jaccard_is_against_the_graph(found):
    _, made, _, _ = found
    # {3, 4, def} against {3, 9, def}, {9, 4, def}, {9, another token}.
    nodes = made["jaccard"]["nodes"]
    assert nodes["each"] == [2 / 4, 2 / 4, 0]
    assert nodes["mean"] == pytest.approx(1 / 3)
    assert 0 <= nodes["low"] <= nodes["mean"] <= nodes["high"] <= 0.5
    assert made["jaccard"]["features"]["each"] == [1 / 3, 1 / 3, 0]
    assert made["jaccard"]["edges"]["each"] == [2 / 6, 2 / 6, 0]


def test_prompts_are_traced_as_the_graph_was(found):
    graph, made, asked, _ = found
    assert [prompt for prompt, *_ in asked] == made["prompts"] == ["one", "two", "three"]
    for _, dictionaries, options in asked:
        assert dictionaries == list(dict.fromkeys(graph.dictionaries))
        kept = {k: options[k] for k in ("targets", "node_threshold", "chat")}
        assert kept == {"targets": ["logit: a"], "node_threshold": 0.5, "chat": False}
        assert "gemscope" not in options


def test_one_prompt_has_no_interval(miniature):
    graph = small([3, 4])
    made = stability(graph, miniature, ["x"], again=lambda *a, **k: graph).stability
    assert made["jaccard"]["nodes"] == {"mean": 1.0, "low": None, "high": None, "each": [1.0]}
    assert {one["share"] for one in made["nodes"] + made["edges"]} == {1.0}


def test_what_is_always_there_does_not_count(miniature):
    graph = small([3])
    made = stability(graph, miniature, ["x"], again=lambda *a, **k: graph).stability
    assert [one["key"].split(".")[0] for one in made["nodes"]] == ["embedding", "feature"]
    assert not any("bias" in one["source"] for one in made["edges"])
    keys = {node_key(graph, Node(Kind.ERROR, 2, p)) for p in range(4)}
    assert keys == {"error.2"}


def test_of_the_miniature(miniature):
    graph = trace(PROMPT, [ALL], model=miniature)
    others = ["def sub(x, y):\n    return x", "class Point:"]
    made = stability(graph, miniature, others)
    near, far = made.stability["jaccard"]["features"]["each"]
    assert near > 2 * far
    assert near > 0.2
    assert all(one["id"] in graph.places for one in made.stability["nodes"] if one["id"])
    # The same seed draws the same intervals.
    assert stability(graph, miniature, others).stability == made.stability
    assert json.loads(json.dumps(made.stability)) == made.stability


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "no other prompts"),
        ([PROMPT, "x = 1"], "the graph's own prompt"),
        (["x = 1", "x = 1"], "given twice"),
        (["x = 1", ""], "prompt is empty"),
    ],
)
def test_mistakes_are_told_in_a_sentence(miniature, prompts, match):
    graph = trace(PROMPT, [ALL], model=miniature)
    with pytest.raises(InputError, match=match):
        stability(graph, miniature, prompts)
