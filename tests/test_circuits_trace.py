"""Attribution graphs: their books close, their targets are what they say, mistakes are refused."""

import json
import math

import pytest
import torch
from transcoded import MODELS, PROMPT, cross_layer, random_model, transcoders

from gemscope.circuits import Kind, trace
from gemscope.errors import InputError
from gemscope.sae import SAE, JumpReLU, Origin
from gemscope.sites import Site, Stream

ALL = "miniature/transcoder_all"
SHARED = (Kind.FEATURE, Kind.ERROR, Kind.EMBEDDING)
SETS = {
    "plain": transcoders,
    "skip": lambda model: transcoders(model, skip=True),
    "gain-free": lambda model: transcoders(model, stream=Stream.MLP_IN_UNSCALED, skip=True),
    "cross-layer": cross_layer,
}


@pytest.fixture(scope="module")
def models():
    return {name: random_model(name) for name in MODELS}


def whole(model, known, **options):
    """The graph without pruning."""
    return trace(
        PROMPT, list(known), model=model, load=known.__getitem__, node_threshold=1,
        edge_threshold=1, **options,
    )  # fmt: skip


def closing(graph):
    """Of each traced node its value and the sum of what comes in, float64."""
    sums = torch.zeros(len(graph.nodes), dtype=torch.float64)
    sums.index_add_(0, graph.edges.target.long(), graph.edges.weight.double())
    sums += graph.books.remainder.nan_to_num()
    there = ~graph.books.value.isnan()
    return graph.books.value[there], sums[there]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", SETS)
def test_the_books_close(models, family, kind):
    graph = whole(models[family], SETS[kind](models[family]))
    assert sum(node.kind is Kind.FEATURE for node in graph.nodes) > 100
    values, sums = closing(graph)
    scale = values.abs().max()
    # Of a chain of some hundred sums in float32, each good to 6e-8 of what is summed.
    assert graph.books.error < 2e-5 * scale
    assert (values - sums).abs().max() < 2e-5 * scale
    # Whoever forgets BOS or a bias is off by far more.
    constants = graph.kinds(Kind.BOS, Kind.BIAS)[graph.edges.source.long()]
    assert graph.edges.weight[constants].abs().max() > 1e-2 * scale


@pytest.mark.parametrize("dictionaries", [ALL, "miniature/clt", f"{ALL}/*_big"])
def test_the_books_of_the_miniature_close(miniature, dictionaries):
    graph = trace(PROMPT, [dictionaries], model=miniature)
    values, sums = closing(graph)
    assert graph.books.error < 1e-5 * values.abs().max()
    assert (values - sums).abs().max() < 1e-5 * values.abs().max()
    assert 0 < graph.scores.replacement < 1
    assert 0 < graph.scores.completeness < 1


def test_pruning_keeps_what_matters_and_says_the_rest(miniature):
    every = trace(PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1)
    some = trace(PROMPT, [ALL], model=miniature)
    assert len(some.nodes) < len(every.nodes) / 3
    assert len(some.edges) < len(every.edges) / 3
    kept = {node.id for node in some.nodes}
    share = sum(
        x for node, x in zip(every.nodes, every.influence.tolist(), strict=True)
        if node.id in kept and node.kind in SHARED
    )  # fmt: skip
    of = every.influence[every.kinds(*SHARED)].sum().item()
    # The share asked for, less nodes that then lead nowhere.
    assert 0.7 < share / of < 0.85
    assert some.scores == every.scores


def test_targets_are_the_likeliest_tokens(miniature):
    graph = trace(PROMPT, [ALL], model=miniature)
    logits = miniature.run(PROMPT, logits=True).logits[0, -1].double()
    chances = logits.softmax(-1)
    best = chances.argsort(descending=True)[: len(graph.targets)].tolist()
    assert [t.token for t in graph.targets] == best
    for target in graph.targets:
        assert math.isclose(target.probability, chances[target.token], rel_tol=1e-5)
        centred = float(logits[target.token] - logits.mean())
        assert math.isclose(target.value, centred, rel_tol=1e-4)
    assert math.isclose(sum(t.weight for t in graph.targets), 1)


def test_targets_of_every_kind(miniature, tmp_path):
    from gemscope.steering import Change, Direction, Mode, Strength, save_vector

    site = Site(2, Stream.RESID_MID)
    direction = torch.linspace(-1, 1, miniature.width(site))
    change = Change(what=Direction(direction, site, "slope"), mode=Mode.ADD, strength=Strength(1.0))
    save_vector([change], tmp_path / "slope.safetensors")
    sae = "miniature/resid_post_all/layer_3_width_384_l0_small"
    graph = trace(
        PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1,
        targets=["difference: self: the", f"feature:{sae}/7@-2",
                 f"vector:{tmp_path / 'slope.safetensors'}",
                 "feature:miniature/attn_out_all/layer_2_width_128_l0_small/3"],
    )  # fmt: skip
    from gemscope import load_sae

    reads = [Site(3, Stream.RESID_POST), site, Site(2, Stream.ATTN_HEADS)]
    run = miniature.run(PROMPT, read=reads, logits=True)
    ids = [
        miniature.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (" self", " the")
    ]
    logits = run.logits[0, -1].double()
    x = run[reads[0]][0, -2:-1]
    heads = load_sae("miniature/attn_out_all/layer_2_width_128_l0_small")
    wanted = [
        float(logits[ids[0]] - logits[ids[1]]),
        float(load_sae(sae).pre_activations(x, [7])),
        float(run[site][0, -1] @ direction),
        float(heads.pre_activations(run[reads[2]][0, -1:], [3])),
    ]
    found = [t.value for t in graph.targets]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    values, sums = closing(graph)
    assert (values - sums).abs().max() < 1e-5 * values.abs().max()


@pytest.mark.parametrize("stream", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_in"])
def test_features_of_any_stream_are_explained(models, stream):
    model = models["gemma-3"]
    known, site = transcoders(model, skip=True), Site(1, Stream(stream))
    d = model.width(site)
    made = torch.Generator().manual_seed(3)
    known["some/sae"] = SAE(
        w_enc=torch.randn(d, 4, generator=made), b_enc=torch.ones(4),
        w_dec=torch.randn(4, d, generator=made), b_dec=torch.zeros(d),
        activation=JumpReLU(torch.ones(4)), reads=site, writes=site,
        origin=Origin(address="some/sae"),
    )  # fmt: skip
    graph = trace(
        PROMPT, [a for a in known if a != "some/sae"], model=model, load=known.__getitem__,
        targets=["feature:some/sae/2"],
    )  # fmt: skip
    run = model.run(PROMPT, read=[site])
    wanted = float(known["some/sae"].pre_activations(run[site][0, -1:], [2]))
    assert graph.targets[0].value == pytest.approx(wanted, rel=1e-4)
    values, sums = closing(graph)
    assert (values - sums).abs().max() < 2e-5 * values.abs().max()
    layers = {graph.nodes[s].layer for s in graph.edges.source.tolist()} - {None}
    assert max(layers) <= 1


def test_a_layer_without_active_features_moves_nothing(models):
    model = models["llama"]
    known = transcoders(model)
    silent = known["random/layer_1"]
    known["random/layer_1"] = SAE(
        **{n: getattr(silent, n) for n in ("w_enc", "b_enc", "w_dec", "b_dec", "reads", "writes",
                                           "origin")},
        activation=JumpReLU(torch.full((silent.d_sae,), 1e6)),
    )  # fmt: skip
    graph = whole(model, known)
    layers = [n.layer for n in graph.nodes if n.kind is Kind.FEATURE]
    assert set(layers) == {0, 2}
    run = model.run(PROMPT, read=[Site(2, Stream.MLP_IN)])
    # Of the last layer, features at other positions than the last lead to no target.
    last = run.tokens.ids.shape[1] - 1
    code = known["random/layer_2"].encode(run[Site(2, Stream.MLP_IN)][0, last:])
    mine = [n for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 2]
    assert {n.position for n in mine} == {last}
    assert [n.feature for n in mine] == code.indices.tolist()
    assert [n.activation for n in mine] == pytest.approx(code.values.tolist(), rel=1e-5)


def test_fewer_features_are_those_that_matter(miniature):
    every = trace(PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1)
    some = trace(
        PROMPT, [ALL], model=miniature, node_threshold=1, edge_threshold=1, max_features=150
    )
    traced = {some.nodes[t].id for t in some.edges.target.unique().tolist()}
    traced = {t for t in traced if t.startswith("feature")}
    assert len(traced) <= 150
    ranked = sorted(
        ((x, node.id) for node, x in zip(every.nodes, every.influence.tolist(), strict=True)
         if node.kind is Kind.FEATURE), reverse=True,
    )  # fmt: skip
    assert len({name for _, name in ranked[:75]} - traced) < 5
    values, sums = closing(some)
    assert (values - sums).abs().max() < 1e-5 * values.abs().max()


def test_positions_no_dictionary_was_trained_on_are_constants(models):
    model = models["gemma-3"]
    graph = whole(model, transcoders(model), chat=False)
    assert {n.position for n in graph.nodes if n.kind is Kind.BOS} == {0}
    assert 0 not in {n.position for n in graph.nodes if n.kind in (Kind.FEATURE, Kind.ERROR)}


def test_bfloat16_closes_as_far_as_it_rounds():
    model = random_model("gemma-3", torch.bfloat16)
    graph = whole(model, transcoders(model))
    values, _ = closing(graph)
    assert graph.books.error < 0.1 * values.abs().max()


def test_a_release_stands_for_one_transcoder_a_layer():
    from gemscope.circuits import transcoder_set

    found = transcoder_set(["gemma-scope-2-1b-pt"])
    assert found == [
        f"gemma-scope-2-1b-pt/transcoder_all/layer_{n}_width_16k_l0_small_affine" for n in range(26)
    ]
    older = transcoder_set(["google/gemma-scope-2b-pt-transcoders"])
    assert [a.split("/")[1] for a in older] == [f"layer_{n}" for n in range(26)]
    assert older[0].endswith("average_l0_76")
    assert transcoder_set(["miniature"]) == transcoder_set([ALL])
    assert transcoder_set(["miniature/clt"]) == ["miniature/clt/width_384_l0_medium_affine"]


# --- the command -----------------------------------------------------------------------------


def test_the_command_says_what_was_promised(command):
    code, out, _ = command("trace", PROMPT, "--with", ALL, "--json")
    assert code == 0
    graph = json.loads(out)
    assert {"nodes", "edges", "targets", "scores", "closure"} <= graph.keys()
    assert {"id", "kind", "layer", "position", "feature", "activation",
            "influence"} <= graph["nodes"][0].keys()  # fmt: skip
    assert {"source", "target", "weight"} == graph["edges"][0].keys()
    assert {"replacement", "completeness"} == graph["scores"].keys()
    assert graph["closure"]["max_abs_error"] < 1e-4
    ids = [node["id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids))
    assert {e["source"] for e in graph["edges"]} | {e["target"] for e in graph["edges"]} <= set(ids)


def test_the_command_tells_a_person(command, tmp_path):
    code, out, err = command("trace", PROMPT, "--with", ALL, "--out", tmp_path / "g.safetensors")
    assert code == 0
    assert "Replacement" in out
    assert "GiB" in err
    assert (tmp_path / "g.safetensors").is_file()
    assert command("graph", tmp_path / "g.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("a b", "--with", "miniature/transcoder_all/layer_1_width_192_l0_big"),
         "no transcoder for layers 0, 2, 3, 4, 5"),
        (("a b", "--with", "miniature/resid_post"), "holds no transcoders"),
        (("a b", "--with", "miniature/resid_post/layer_3_width_2k_l0_medium"), "stands for no MLP"),
        (("a b", "--with", ALL, "--with", "miniature/clt"), "give it alone"),
        (("a b", "--with", f"{ALL}/*small", "--with", f"{ALL}/*big"), "both stand for"),
        (("a b", "--with", "nothing/here"), "no artefact|not in the cache"),
        (("", "--with", ALL), "prompt is empty"),
        (("a", "--with", ALL), "one token"),
        (("x = 1\n" * 4000, "--with", ALL), "longer than"),
        (("a b", "--with", ALL, "--target", "logit:no such token"), "not one token"),
        (("a b", "--with", ALL, "--target", "loss"), "names no target"),
        (("a b", "--with", ALL, "--target", "logits: a"), "did you mean|no target"),
        (("a b", "--with", ALL, "--target", f"feature:{ALL}/layer_1_width_192_l0_big/999"),
         "features 0 to 191"),
        (("a b", "--with", ALL, "--target", f"feature:{ALL}/layer_1_width_192_l0_big/9@40"),
         "outside the prompt"),
        (("a b", "--with", ALL, "--nodes", "1.5"), "above 0 and up to 1"),
        (("a b", "--with", ALL, "--max-features", "0"), "at least 1|range"),
        (("a b", "--with", ALL, "--out", "graph.pt"), "safetensors"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(refused, arguments, match):
    refused("trace", *arguments, match=match)


def test_what_does_not_fit_is_refused_before(miniature, monkeypatch):
    from gemscope.circuits import _memory

    said = []
    monkeypatch.setattr(_memory, "_free", lambda _device: 2**29 + 2**21)
    with pytest.raises(InputError, match=r"free; (trace [\d,]+ features at most|give a shorter)"):
        trace(PROMPT, [ALL], model=miniature, planned=said.append)
    assert said[0].bytes > 2**29


def test_another_models_transcoders_are_refused(models):
    model = models["llama"]
    with pytest.raises(InputError, match="belongs to another model"):
        trace(PROMPT, ["miniature/clt"], model=model)


def test_fused_attention_is_refused():
    import transformers as hf

    from gemscope import miniature as bundled
    from gemscope.lm import LanguageModel

    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=4096, n_positions=64)
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    model = LanguageModel(hf.GPT2LMHeadModel(config).eval(), tokenizer)
    known = transcoders(model)
    with pytest.raises(InputError, match="patterns cannot be read"):
        whole(model, known)
