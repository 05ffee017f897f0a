"""Interventions that check a graph: laws in the frozen model, plain edits in the real one."""

import json
from dataclasses import replace

import pytest
import torch
from circuits_graphs import graph_of
from transcoded import MODELS, cross_layer, random_model, transcoders

from gemscope.circuits import Kind, Node, check, load_graph, save_graph, total_effects, trace
from gemscope.circuits import _check as checking
from gemscope.errors import InputError
from gemscope.lm import Edit
from gemscope.sites import Site, Stream
from gemscope.steering import agreement

ALL = "miniature/transcoder_all"
PROMPT = "def add(a, b):\n    return a"


@pytest.fixture(scope="module")
def whole(miniature):
    """Nothing pruned: all that a node adds is shown."""
    return trace(PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1)


@pytest.fixture(scope="module")
def checked(whole, miniature):
    return check(whole, miniature, 12)


def off(claims):
    """The largest difference of what was predicted from what the frozen model did, of all."""
    largest = max(abs(one["predicted"]) for one in claims)
    return max(abs(one["predicted"] - one["frozen"]) for one in claims) / largest


def test_edges_and_nodes_agree_in_the_frozen_model(checked):
    # A law: float32 rounds, and nothing else differs.
    assert off(checked.checked["edges"]) < 2e-6
    assert off(checked.checked["nodes"]) < 2e-6
    for name in ("frozen", "frozen_nodes"):
        assert checked.checked["agreement"][name]["pearson"] > 1 - 1e-9
        assert checked.checked["agreement"][name]["same_sign"] == 1
    # Not so in the model, which answers: a check that cannot fail would agree there too.
    for name in ("model", "model_nodes"):
        assert -1 <= checked.checked["agreement"][name]["pearson"] < 0.99


def test_features_of_which_nothing_is_known_pass_nothing_on(whole):
    value = whole.books.value.clone()
    first = next(i for i, node in enumerate(whole.nodes) if node.kind is Kind.FEATURE)
    value[first] = float("nan")
    effects = total_effects(
        replace(whole, books=replace(whole.books, value=value)), range(len(whole.nodes))
    )
    assert bool(effects.isfinite().all())
    every = total_effects(whole, range(len(whole.nodes)))
    tokens = whole.kinds(Kind.EMBEDDING)
    assert not torch.equal(effects[tokens], every[tokens])


@pytest.mark.parametrize("family", ["gemma-2", "gemma-3", "llama with biases"])
@pytest.mark.parametrize("kind", ["skip", "cross-layer"])
def test_families_and_kinds_agree_in_the_frozen_model(family, kind):
    assert family in MODELS
    model = random_model(family, torch.float64)
    known = cross_layer(model) if kind == "cross-layer" else transcoders(model, skip=True)
    graph = trace(
        "def area(w):", list(known), model=model, load=known.__getitem__, node_threshold=1,
        edge_threshold=1, targets=["difference: self: the", "logit: self"],
    )  # fmt: skip
    found = check(graph, model, 25, step=-0.3, load=known.__getitem__).checked
    assert (found["step"], len(found["edges"]), len(found["nodes"])) == (-0.3, 25, 50)
    assert off(found["edges"]) < 1e-6
    assert off(found["nodes"]) < 1e-6


def test_the_strongest_are_checked(whole, checked):
    e, changed = whole.edges, whole.kinds(Kind.FEATURE, Kind.ERROR)
    size = torch.where(changed[e.source.long()], e.weight.abs(), torch.tensor(0.0))
    wanted = [
        (whole.nodes[e.source[i]].id, whole.nodes[e.target[i]].id, 0.1 * e.weight[i].item())
        for i in size.argsort(descending=True)[:12]
    ]
    found = [(one["source"], one["target"], one["predicted"]) for one in checked.checked["edges"]]
    assert found == [(s, t, pytest.approx(w)) for s, t, w in wanted]
    best = torch.where(changed, whole.influence, 0.0).argsort(descending=True)[:12]
    ids = list(dict.fromkeys(one["id"] for one in checked.checked["nodes"]))
    assert ids == [whole.nodes[i].id for i in best]
    assert len(checked.checked["nodes"]) == 12 * len(whole.targets)


def test_agreement_is_of_what_is_listed(checked):
    found = checked.checked
    for name, rows, column in (("model", "edges", "model"), ("model_nodes", "nodes", "model"),
                               ("frozen", "edges", "frozen")):  # fmt: skip
        made = agreement([(one["predicted"], one[column]) for one in found[rows]])
        assert found["agreement"][name] == {
            "pearson": made.pearson, "same_sign": made.same_sign, "n": len(found[rows])
        }  # fmt: skip


def test_kinds_can_be_chosen(whole, miniature):
    found = check(whole, miniature, 5, kinds=[Kind.FEATURE]).checked
    assert {one["source"].split(".")[0] for one in found["edges"]} == {"feature"}
    assert {one["id"].split(".")[0] for one in found["nodes"]} == {"feature"}
    assert found["agreement"]["model_feature"] == found["agreement"]["model"]
    assert "model_error" not in found["agreement"]


def test_what_the_model_does_is_what_an_edit_does(miniature, whole):
    from gemscope import load_sae

    node = next(
        n for i in whole.influence.argsort(descending=True).tolist()
        if (n := whole.nodes[i]).kind is Kind.FEATURE
    )  # fmt: skip
    row = load_sae(whole.dictionaries[node.layer]).w_dec[node.feature].float()
    site = Site(node.layer, Stream.MLP_OUT)

    def without(tokens, x):
        out = x.clone()
        out[tokens.positions == node.position] -= node.activation * row
        return out

    before = miniature.run(PROMPT, logits=True).logits[0, -1].double()
    edit = Edit(site, site, without, placed=True)
    after = miniature.run(PROMPT, logits=True, edits=[edit]).logits[0, -1].double()
    moved = (after - after.mean()) - (before - before.mean())
    nodes = check(whole, miniature, 2, kinds=[Kind.FEATURE]).checked["nodes"]
    mine = [one for one in nodes if one["id"] == node.id]
    assert len(mine) == len(whole.targets)
    for one in mine:
        target = whole.targets[int(one["target"].split(".")[1])]
        assert one["model"] == pytest.approx(moved[target.token].item(), abs=2e-5)


def test_a_wrong_edge_is_found(whole, miniature):
    place = int((whole.edges.weight.abs() * whole.kinds(Kind.ERROR)[whole.edges.source.long()])
                .argmax())  # fmt: skip
    weight = whole.edges.weight.clone()
    weight[place] *= -30
    wrong = replace(whole, edges=replace(whole.edges, weight=weight))
    first = check(wrong, miniature, 3).checked["edges"][0]
    assert first["predicted"] == pytest.approx(-30 * first["frozen"], rel=1e-4)


def test_total_effects_go_all_ways():
    a, b, c = (
        Node(Kind.FEATURE, layer, 1, 5, activation=value)
        for layer, value in enumerate((1.0, 5.0, 6.0))
    )
    token, bias = Node(Kind.EMBEDDING, position=1), Node(Kind.BIAS, 0)
    goal = Node(Kind.TARGET, number=0)
    graph = graph_of(
        [a, b, c, token, bias, goal],
        {(token.id, a.id): 1.0, (a.id, b.id): 2.0, (bias.id, b.id): 3.0, (a.id, c.id): 1.5,
         (b.id, c.id): 4.5, (c.id, goal.id): 12.0, (b.id, goal.id): -1.0},
    )  # fmt: skip
    found = total_effects(graph, [3, 0, 1, 5])
    # Through b: 2 of its 5. Through c: (1.5 + 4.5 * 2/5) of its 6.
    through_c = (1.5 + 4.5 * 2 / 5) / 6 * 12
    assert found[1].tolist() == pytest.approx([0, 2, 3.3, 0, 0, through_c - 2 / 5])
    assert found[0].tolist() == pytest.approx([1, 2, 3.3, 0, 0, through_c - 2 / 5])
    assert found[2].tolist() == pytest.approx([0, 0, 4.5, 0, 0, 8.0])
    assert not found[3].any()


def test_pruning_is_what_nodes_then_lack(miniature, checked):
    some = check(trace(PROMPT, [ALL], model=miniature), miniature, 12).checked
    assert off(some["edges"]) < 2e-6
    assert off(some["nodes"]) > 1e-3
    assert 0.5 < some["agreement"]["frozen_nodes"]["pearson"] < 1


def test_batches_make_no_difference(whole, miniature, checked, monkeypatch):
    said = []
    monkeypatch.setattr(checking, "rows_at_once", lambda _model, _seq: 4)
    few = check(whole, miniature, 12, progress=lambda *a: said.append(a))
    for one, other in zip(few.checked["nodes"], checked.checked["nodes"], strict=True):
        assert one["model"] == pytest.approx(other["model"], abs=1e-5)
        assert one["id"] == other["id"]
    assert len(said) > 8
    assert said[-1][1] == said[-1][2]
    assert {what for what, *_ in said} == {"checks"}


def test_features_and_directions_are_checked_too(miniature, tmp_path):
    sae = "miniature/resid_post_all/layer_3_width_384_l0_small"
    graph = trace(
        PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1,
        targets=[f"feature:{sae}/7@-2", "difference: self: the"],
    )  # fmt: skip
    made = check(graph, miniature, 6)
    assert off(made.checked["nodes"]) < 2e-6
    assert len(made.checked["nodes"]) == 12
    save_graph(made, tmp_path / "g.safetensors")
    again = load_graph(tmp_path / "g.safetensors")
    assert again.checked == json.loads(json.dumps(made.checked))
    # What was loaded can be checked again.
    assert check(again, miniature, 6).checked == made.checked


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "at least 1"),
        ({"n": 3, "step": 0}, "cannot be changed by 0"),
        ({"n": 3, "step": 2.5}, "cannot be changed by 2.5"),
        ({"n": 3, "step": float("nan")}, "cannot be changed by nan"),
        ({"n": 3, "kinds": [Kind.BIAS]}, "bias cannot be changed; give feature, error"),
        ({"n": 3, "kinds": []}, "nothing cannot be changed"),
    ],
)
def test_mistakes_are_told_in_a_sentence(whole, miniature, options, match):
    with pytest.raises(InputError, match=match):
        check(whole, miniature, **options)


def test_other_models_and_prompts_are_refused(whole, miniature):
    with pytest.raises(InputError, match="the graph is of google/gemma-9, not of"):
        check(replace(whole, model="google/gemma-9"), miniature, 3)
    with pytest.raises(InputError, match="cuts the graph's prompt into other tokens"):
        check(replace(whole, prompt="def"), miniature, 3)
    first = replace(whole.nodes[0], feature=whole.nodes[0].feature + 1_000)
    with pytest.raises(InputError, match="is silent in this model"):
        check(replace(whole, nodes=(first, *whole.nodes[1:])), miniature, 3)
