"""What attention carries: shares, sources and pairs that sum to what they are shares of."""

import json

import pytest
import torch
from transcoded import MODELS, cross_layer, random_model, transcoders

from gemscope.circuits import Kind, save_graph, trace
from gemscope.circuits._heads import direct_attribution, explain_edge, head_shares
from gemscope.circuits._hold import Held
from gemscope.circuits._query_key import attribute_attention
from gemscope.circuits._replay import Probe, Replay
from gemscope.errors import InputError
from gemscope.sae import SAE, JumpReLU, Origin
from gemscope.sites import Site, Stream

SHORT = "def area(width):\n    return"
ALL = "miniature/transcoder_all"
ATTENTION = "miniature/attn_out_all/layer_2_width_128_l0_small"


@pytest.fixture(scope="module")
def models():
    return {name: random_model(name, torch.float64) for name in MODELS}


def dictionary(model, site, *, d_sae=16):
    """A random one of a stream."""
    made, d = torch.Generator().manual_seed(5), model.width(site)
    new = lambda *shape: torch.randn(*shape, generator=made) / shape[0] ** 0.5  # noqa: E731
    return SAE(
        w_enc=new(d, d_sae), b_enc=0.1 * new(d_sae), w_dec=new(d_sae, d), b_dec=new(d),
        activation=JumpReLU(torch.full((d_sae,), 0.2)), reads=site, writes=site,
        origin=Origin(address="some/sae"),
    )  # fmt: skip


def replayed(model, known):
    graph = trace(
        SHORT, list(known), model=model, load=known.__getitem__, node_threshold=1, edge_threshold=1
    )
    return graph, Replay.of(graph, model, known.__getitem__)


# --- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["skip", "cross-layer"])
def test_shares_sum_to_the_edge_in_every_layer(models, family, kind):
    model = models[family]
    known = cross_layer(model) if kind == "cross-layer" else transcoders(model, skip=True)
    graph, replay = replayed(model, known)
    kinds = [node.kind for node in graph.nodes]
    e, seen, later, skipped = graph.edges, set(), 0, 0
    for i in e.weight.abs().argsort(descending=True).tolist():
        source, target = int(e.source[i]), int(e.target[i])
        what = (kinds[source], kinds[target], graph.nodes[source].layer)
        if kinds[source] is Kind.BIAS or what in seen:
            continue
        seen.add(what)
        layers, weight = head_shares(
            replay.frozen, replay.writes(graph.nodes[source]), replay.probe(graph.nodes[target])
        )
        scale = e.weight[i].abs().item()
        assert weight == pytest.approx(e.weight[i].item(), rel=1e-5)
        first = graph.nodes[source].layer
        last = graph.nodes[target].layer
        first = -1 if first is None else first
        last = model.n_layers - 1 if last is None else last
        assert [one.layer for one in layers] == list(range(first + 1, last + 1))
        for one in layers:
            assert len(one.heads) == model.config.num_attention_heads
            assert abs(sum(one.heads) + one.bypass + one.later - weight) < 1e-7 * max(1, scale)
            later += one.later != 0
            skipped += one.skip is not None and one.skip != 0
    assert len(seen) >= 12
    assert skipped
    assert bool(later) == (kind == "cross-layer")


@pytest.mark.parametrize("family", ["gemma-2", "gemma-3", "llama"])
@torch.no_grad()
def test_a_heads_share_is_what_is_lost_without_it(models, family):
    model = models[family]
    known = transcoders(model, skip=True)
    graph, replay = replayed(model, known)
    # A token leads to the target over both other layers' heads too.
    source = graph.nodes[graph.place("embedding.3")]
    probe = replay.probe(graph.nodes[graph.place("target.0")])
    layers, weight = head_shares(replay.frozen, replay.writes(source), probe)

    def without(layer, head):
        held = Held(model, replay.prompt.batch, replay.transcoders, replay.active)
        held._patterns[layer] = held._patterns[layer].clone()
        held._patterns[layer][head] = 0
        return float(held.probed([replay.writes(source)], [probe])[0, 0])

    for layer in (0, 1, 2):
        for head in (0, 3):
            lost = weight - without(layer, head)
            assert layers[layer].heads[head] == pytest.approx(lost, rel=1e-6, abs=1e-9)
    assert max(abs(x) for one in layers for x in one.heads) > 1e-3


def test_edges_of_the_miniature(miniature):
    graph = trace("def add(a, b):\n    return a", [ALL], model=miniature)
    best = graph.edges.weight.abs().argsort(descending=True)
    at = next(i for i in best.tolist()
              if graph.nodes[graph.edges.source[i]].position
              != graph.nodes[graph.edges.target[i]].position
              and graph.nodes[graph.edges.source[i]].kind is Kind.EMBEDDING)  # fmt: skip
    ends = [graph.nodes[int(column[at])].id for column in (graph.edges.source, graph.edges.target)]
    found = explain_edge(graph, miniature, *ends).json()
    weight = graph.edges.weight[at].item()
    assert (found["source"], found["target"]) == tuple(ends)
    assert found["weight"] == pytest.approx(weight, rel=1e-4)
    for one in found["layers"]:
        assert sum(one["heads"]) + one["bypass"] + one["later"] == pytest.approx(weight, rel=1e-4)
    # From one position to another, heads carry it.
    assert max(abs(sum(one["heads"])) for one in found["layers"]) > 0.1 * abs(weight)
    for source, target, match in (
        ("nothing.1", ends[1], "no node nothing.1"),
        (ends[0], "embedding.1", "nothing comes into embedding.1"),
        ("target.0", ends[1], "no single thing that is written"),
    ):
        with pytest.raises(InputError, match=match):
            explain_edge(graph, miniature, source, target)
    late = next(n.id for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 5)
    early = next(n.id for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 0)
    with pytest.raises(InputError, match="nothing leads from"):
        explain_edge(graph, miniature, late, early)


# --- features of attention -------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("stream", [Stream.ATTN_HEADS, Stream.ATTN_OUT])
def test_parts_and_bias_are_the_pre_activation(models, family, stream):
    model, site = models[family], Site(1, stream)
    sae = dictionary(model, site)
    found = direct_attribution(model, SHORT, "some/sae/5", position=-2, load=lambda _a: sae)
    run = model.run(SHORT, read=[site, Site(1, Stream.ATTN_HEADS)], attention=True)
    x = run[site][0, found.position]
    wanted = float(x @ sae.w_enc[:, 5].double()) + float(sae.b_enc[5])
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert float(found.parts.sum()) + found.bias == pytest.approx(wanted, rel=2e-6, abs=2e-6)
    assert found.parts.shape == (4, found.position + 1)
    if stream is Stream.ATTN_HEADS:
        # Head by head, and each head's tokens by its pattern.
        heads = x.view(4, -1) * sae.w_enc[:, 5].double().view(4, -1)
        assert torch.allclose(found.parts.sum(1), heads.sum(1), rtol=1e-5, atol=1e-6)
        unseen = run.patterns[1][0, :, found.position, : found.position + 1] == 0
        assert (found.parts[unseen] == 0).all()


def test_features_of_attention_are_told_apart(miniature):
    with pytest.raises(InputError, match="not what attention gives"):
        direct_attribution(miniature, SHORT, f"{ALL}/layer_1_width_192_l0_big/3")
    with pytest.raises(InputError, match="outside the prompt"):
        direct_attribution(miniature, SHORT, f"{ATTENTION}/3", position=99)
    with pytest.raises(InputError, match="features 0 to 127"):
        direct_attribution(miniature, SHORT, f"{ATTENTION}/128")


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*MODELS, "qwen3"])
def test_scores_are_those_that_softmax_was_given(models, family):
    if family == "qwen3":
        model = qwen3()
    else:
        model = models[family]
    known = transcoders(model, skip=True)
    names, layer, query = list(known), 2, 8
    patterns = model.run(SHORT, attention=True).patterns[layer][0]
    for head in (0, 3):
        scores = []
        there = (patterns[head, query] > 0).nonzero()[:, 0].tolist()
        for key in there:
            one = attribute_attention(
                model, SHORT, layer, head, query=query, key=key, dictionaries=names,
                load=known.__getitem__, top=3,
            )  # fmt: skip
            assert one.summed == pytest.approx(one.score, rel=2e-5, abs=2e-5)
            for side in (one.queries, one.keys):
                assert float(side.sum()) == pytest.approx(one.score, rel=2e-5, abs=2e-5)
            assert one.pattern == float(patterns[head, query, key])
            scores.append(one.score)
        cap = getattr(model.config, "attn_logit_softcapping", None)
        found = torch.tensor(scores, dtype=torch.float64)
        found = found if cap is None else cap * torch.tanh(found / cap)
        assert torch.allclose(found.softmax(0), patterns[head, query, there].double(), atol=2e-6)
        assert len(there) > 4


def qwen3():
    import transformers as hf
    from transcoded import SIZES

    from gemscope.lm import LanguageModel

    torch.manual_seed(0)
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=12))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokenizer = random_model("llama").tokenizer
    return LanguageModel(model.double().eval().requires_grad_(False), tokenizer)


@torch.no_grad()
def test_pairs_are_what_the_score_loses_without_them(models):
    """The score is bilinear: of a token's share of both sides, by parts taken out of the stream."""
    model = models["llama with biases"]
    known = transcoders(model)
    layer, head, query, key = 1, 2, 8, 4
    found = attribute_attention(
        model, SHORT, layer, head, query=query, key=key, dictionaries=list(known), top=10_000,
        load=known.__getitem__,
    )  # fmt: skip
    sizes = [abs(value) for *_, value in found.pairs]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(value for *_, value in found.pairs) == pytest.approx(found.score, rel=1e-5)
    # A part's column of pairs is what the query's side gets from it.
    part = max(range(len(found.parts)), key=lambda i: float(found.queries[i].abs()))
    mine = sum(value for q, _, value in found.pairs if q == part)
    assert mine == pytest.approx(float(found.queries[part]), rel=1e-6)
    # Nothing written in this layer or later has a part, but for its own biases.
    for one in found.parts:
        assert one.layer is None or one.layer < layer or one.kind is Kind.BIAS
        assert one.position is None or one.position <= query


@pytest.mark.parametrize("site", [Site(2, Stream.RESID_PRE), Site(1, Stream.RESID_POST)])
@pytest.mark.parametrize("family", ["gemma-3", "qwen2"])
def test_a_dictionary_of_the_stream_explains_it_too(models, family, site):
    model = models[family]
    sae = dictionary(model, site)
    found = attribute_attention(
        model, SHORT, 2, 1, query=-1, key=7, dictionaries=["some/sae"], load=lambda _a: sae
    )
    assert found.summed == pytest.approx(found.score, rel=1e-5, abs=1e-6)
    x = model.run(SHORT, read=[site])[site][0]
    features = {(part.position, part.feature) for part in found.parts if part.kind is Kind.FEATURE}
    wanted = {(p, i) for p in (found.query, found.key)
              for i in sae.encode(x[p : p + 1]).indices.tolist()}  # fmt: skip
    assert features == wanted
    assert found.json()["rest"] == pytest.approx(
        found.score - sum(one["value"] for one in found.json()["pairs"]), abs=1e-5
    )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"layer": 6}, "there is no head 6/1"),
        ({"head": 4}, "heads 0 to 3"),
        ({"query": 2, "key": 5}, "comes after the query"),
        ({"key": 80}, "outside the prompt"),
        ({"dictionaries": ["miniature/resid_post_all/layer_3_width_384_l0_small"]},
         "not the stream before layer 2"),
        ({"dictionaries": [f"{ALL}/layer_1_width_192_l0_big"]}, "no transcoder for layers"),
        ({"top": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(miniature, given, match):
    options = {"layer": 2, "head": 1, "query": -1, "key": 2, "dictionaries": [ALL]} | given
    with pytest.raises(InputError, match=match):
        attribute_attention(miniature, SHORT, **options)


def test_what_lies_outside_a_window_is_refused(models):
    model = models["gemma-3"]
    known = transcoders(model)
    with pytest.raises(InputError, match="outside the window"):
        attribute_attention(model, SHORT, 0, 0, query=8, key=1, dictionaries=list(known),
                            load=known.__getitem__)  # fmt: skip


def test_fused_families_are_refused():
    import transformers as hf

    from gemscope import miniature as bundled
    from gemscope.lm import LanguageModel

    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=4096, n_positions=64)
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    model = LanguageModel(hf.GPT2LMHeadModel(config).eval(), tokenizer)
    with pytest.raises(InputError, match="in one matrix"):
        attribute_attention(model, SHORT, 1, 1, query=-1, key=2, dictionaries=[ALL])
    sae = dictionary(model, Site(1, Stream.ATTN_HEADS))
    with pytest.raises(InputError, match=r"cannot be read|built otherwise"):
        direct_attribution(model, SHORT, "some/sae/2", load=lambda _a: sae)


def test_probes_of_what_attention_gives(models):
    """What is read from attention alone passes beside it to nothing."""
    model = models["gemma-2"]
    _, replay = replayed(model, transcoders(model))
    (write,) = replay.writes(replay.graph.nodes[replay.graph.place("embedding.2")])
    for stream in (Stream.ATTN_OUT, Stream.ATTN_HEADS):
        probe = Probe(Site(1, stream), 5, torch.ones(model.width(Site(1, stream))))
        layers, weight = head_shares(replay.frozen, [write], probe)
        assert [one.layer for one in layers] == [0, 1]
        assert layers[1].bypass == 0
        for one in layers:
            assert sum(one.heads) + one.bypass == pytest.approx(weight, rel=1e-9)


# --- the command -----------------------------------------------------------------------------


def test_the_command_tells_what_feeds_a_feature(command):
    code, out, _ = command("heads", SHORT, "--feature", f"{ATTENTION}/3", "--at", -2, "--json")
    assert code == 0
    found = json.loads(out)
    total = sum(map(sum, found["parts"])) + found["bias"]
    assert total == pytest.approx(found["pre_activation"], rel=1e-4, abs=1e-4)
    assert found["position"] == len(found["tokens"]) - 2
    code, out, _ = command("heads", SHORT, "--feature", f"{ATTENTION}/3")
    assert code == 0
    assert "pre-activation" in out
    assert "2/3" in out


def test_the_command_tells_why_a_head_attends(command):
    asked = ("heads", SHORT, "--head", "3/1", "--key", 0, "--with", ALL, "--top", 5)
    code, out, _ = command(*asked, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["sum"] == pytest.approx(found["score"], rel=1e-4)
    assert len(found["pairs"]) == 5
    code, out, _ = command(*asked)
    assert code == 0
    assert "All other pairs together" in out


def test_the_command_tells_who_carries_an_edge(command, miniature, tmp_path):
    graph = trace(SHORT, [ALL], model=miniature)
    save_graph(graph, tmp_path / "g.safetensors")
    at = int((graph.edges.weight.abs() * ~graph.kinds(Kind.BIAS)[graph.edges.source.long()])
             .argmax())  # fmt: skip
    ends = [graph.nodes[int(column[at])].id for column in (graph.edges.source, graph.edges.target)]
    asked = ("heads", "--graph", tmp_path / "g.safetensors", "--edge", *ends)
    code, out, _ = command(*asked, "--json")
    assert code == 0
    assert json.loads(out)["weight"] == pytest.approx(graph.edges.weight[at].item(), rel=1e-4)
    code, out, _ = command(*asked)
    assert code == 0
    assert "head 3" in out
    assert "bypass" in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("x = 1",), "nothing to be explained"),
        (("x = 1", "--head", "1/2", "--feature", f"{ATTENTION}/3"), "give one of"),
        (("x = 1", "--head", "1/2", "--key", "1"), "--head needs --with"),
        (("x = 1", "--head", "1/2"), "--head needs --key and --with"),
        (("x = 1", "--head", "1.2", "--key", "1", "--with", ALL), "names no head"),
        (("x = 1", "--feature", f"{ATTENTION}/3", "--key", "1"), "--key is for --head"),
        (("--feature", f"{ATTENTION}/3"), "is about a prompt"),
        (("--graph", "nothing.safetensors"), "--graph needs --edge"),
        (("x", "--graph", "g.safetensors", "--edge", "a", "b"), "has its own prompt"),
        (("--graph", "nothing.safetensors", "--edge", "a", "b"), "nothing.safetensors"),
        (("x = 1", "--feature", f"{ALL}/layer_1_width_192_l0_big/3"), "not what attention gives"),
    ],
)
def test_the_command_tells_mistakes_in_a_sentence(refused, arguments, match):
    refused("heads", *arguments, match=match)
