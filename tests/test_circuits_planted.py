"""Circuits that were built into a model by hand are found."""

import pytest
import torch
from handbuilt import induction, lookup

from gemscope.circuits import Kind, trace


def traced(made, prompt, target, **options):
    model, known = made
    return trace(
        prompt, list(known), model=model, load=known.__getitem__, targets=[target], **options
    )


def into(graph, node):
    """Edges into a node, `source id: weight`."""
    place = graph.place(node)
    mine = graph.edges.target == place
    sources = graph.edges.source[mine].tolist()
    weights = graph.edges.weight[mine].tolist()
    return {graph.nodes[s].id: w for s, w in zip(sources, weights, strict=True)}


def test_a_lookup_in_two_steps():
    graph = traced(lookup(), " return self)", "logit: None")
    last = len(graph.tokens) - 1
    features = [node.id for node in graph.nodes if node.kind is Kind.FEATURE]
    assert features == [f"feature.0.0.{last}", f"feature.1.1.{last}"]
    found = into(graph, "target.0")
    assert max(found, key=lambda one: abs(found[one])) == f"feature.1.1.{last}"
    assert found[f"feature.1.1.{last}"] == pytest.approx(graph.targets[0].value, rel=1e-5)
    second = into(graph, f"feature.1.1.{last}")
    assert second.keys() == {f"feature.0.0.{last}"}
    # What remains is the feature's own bias, which carries nothing of the prompt.
    rest = graph.books.remainder[graph.place(f"feature.1.1.{last}")]
    assert float(rest) == pytest.approx(-0.5, rel=1e-4)
    assert into(graph, f"feature.0.0.{last}").keys() == {f"embedding.{last}"}


def test_transcoders_without_error_explain_everything():
    graph = traced(lookup(), " return self)", "logit: None", node_threshold=1, edge_threshold=1)
    # An error is what float32 rounds off.
    assert graph.scores.replacement == pytest.approx(1, abs=1e-6)
    assert graph.scores.completeness == pytest.approx(1, abs=1e-6)


def test_an_induction_pair():
    made = induction()
    prompt = "(" + " self" + ")" + " the" + " return" + ")"
    model, _ = made
    run = model.run(prompt, logits=True, attention=True)
    ids = run.tokens.ids[0].tolist()
    assert len(ids) == 7
    # What was built: each token attends to the one before it, and `)` to what followed `)`.
    steps = torch.arange(1, 7)
    assert bool((run.patterns[0][0, 0, steps, steps - 1] > 0.99).all())
    assert float(run.patterns[1][0, 0, 6, 4]) > 0.99
    assert int(run.logits[0, -1].argmax()) == ids[4]
    graph = traced(made, prompt, "logit: the", node_threshold=1, edge_threshold=1)
    found = into(graph, "target.0")
    strongest = sorted(found, key=lambda one: -abs(found[one]))
    assert strongest[0] == "embedding.4"
    assert found["embedding.4"] == pytest.approx(graph.targets[0].value, rel=0.02)
    assert abs(found[strongest[1]]) < 0.02 * found["embedding.4"]
