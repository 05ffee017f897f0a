"""Other libraries' layouts: folded weights compute what their makers' unfolded ones do."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden_layouts import (
    HOOK,
    LLAMA,
    MLP_IN,
    MLP_OUT,
    R1,
    RESID,
    TRANSCODER,
    D,
    F,
    agrees,
    as_sae,
    capital,
    dictionary_learning,
    drawn,
    linear,
    llama_scope,
    only,
    openmoss_unfolded,
    plain_unfolded,
    r1_distill,
    saelens,
    sparsify,
    stored,
    tensor,
)

from gemscope import formats
from gemscope.sites import Site, Stream, site_of_transformer_lens, transformer_lens_hook

# Llama Scope


def by_hand(dtype=torch.float32):
    """Two features with decoder rows of lengths 5 and 2, and one that writes nothing."""
    return {
        "encoder.weight": torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0.5, 2], [7, 7, 7, 7]]).to(dtype),
        "encoder.bias": torch.tensor([0.5, -1, 3]).to(dtype),
        "decoder.weight": torch.tensor([[3.0, 0, 0], [0, 2, 0], [4, 0, 0], [0, 0, 0]]).to(dtype),
        "decoder.bias": torch.tensor([0.25, -0.5, 1, 0]).to(dtype),
    }


SMALL = {"d_model": 4, "d_sae": 3, "dataset_average_activation_norm": {"in": 4.0, "out": 8.0}}
# Scales 2/4 = 1/2 in and 2/8 = 1/4 out: decoder rows are twice as long once they are folded in.
W_ENC = tensor([10.0, -4, 0], [20, 0, 0], [30, 2, 0], [40, 8, 0])
B_ENC = tensor(2 * 10 * 0.5, 2 * 4 * -1.0, 0)
W_DEC = tensor([0.6, 0, 0.8, 0], [0, 1, 0, 0], [0, 0, 0, 0])
B_DEC = tensor(1.0, -2, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_scope_by_hand(tmp_path, dtype):
    hooks = {"hook_point_in": MLP_IN, "hook_point_out": MLP_OUT}
    folder = llama_scope(tmp_path, by_hand(dtype), **SMALL, **hooks, jump_relu_threshold=0.5)
    part = only(folder)
    assert torch.equal(part.w_enc, W_ENC)
    assert torch.equal(part.b_enc, B_ENC)
    assert torch.equal(part.w_dec, W_DEC)
    assert torch.equal(part.b_dec, B_DEC)
    assert torch.equal(part.threshold, tensor(0.5, 0.5, 0.5))
    assert part.k is None
    facts = formats.inspect(folder)
    assert (facts.kind, facts.activation, facts.layout) == ("transcoder", "jumprelu", "llama-scope")
    assert (facts.reads, facts.writes) == (
        Site(5, Stream.MLP_IN_UNSCALED),
        Site(5, Stream.MLP_OUT),
    )
    assert facts.dtype == str(dtype).removeprefix("torch.")
    assert (facts.model, facts.l0) == (None, None)
    assert [f.name for f in facts.files] == ["final.safetensors"]


@pytest.mark.parametrize("hooks", [{}, TRANSCODER], ids=["sae", "transcoder"])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
def test_llama_scope_folded_is_llama_scope_unfolded(tmp_path, hooks, by_norm, act_fn):
    w, x = drawn(1)
    changes = hooks | {"sparsity_include_decoder_norm": by_norm, "act_fn": act_fn}
    config, tensors = LLAMA | changes, linear(w)
    norms = config["dataset_average_activation_norm"]
    x = x * norms["in"] / D**0.5
    wanted = openmoss_unfolded(x, tensors, config, norms["in"], norms["out"])
    agrees(only(llama_scope(tmp_path, tensors, **changes)), x, wanted)


def test_llama_scope_needs_the_lengths_of_its_decoder_rows(tmp_path):
    """What omits them fires otherwise: the test above can tell."""
    w, x = drawn(1)
    part, scale = only(llama_scope(tmp_path, linear(w))), D**0.5 / 10.5
    omitted = as_sae(replace(part, w_enc=w["w_enc"], b_enc=w["b_enc"] / scale)).encode(x).dense()
    assert not torch.equal(omitted != 0, as_sae(part).encode(x).dense() != 0)


@pytest.mark.parametrize("layout", ["llama-scope", "r1"])
def test_openmoss_biases(tmp_path, layout):
    w, x = drawn(2)
    norms = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(10.5)}
    more = norms | {"log_jumprelu_threshold": w["threshold"].log()}
    place, extra = (llama_scope, {}) if layout == "llama-scope" else (r1_distill, more)
    base, heights = (LLAMA, None) if layout == "llama-scope" else (R1, w["threshold"])
    less = {"apply_decoder_bias_to_pre_encoder": True}
    wanted = openmoss_unfolded(x, linear(w), base | less, 10.5, 10.5, thresholds=heights)
    agrees(only(place(tmp_path / "less", linear(w) | extra, **less)), x, wanted)
    bare = {n: t for n, t in linear(w).items() if n != "decoder.bias"}
    wanted = openmoss_unfolded(x, bare, base, 10.5, 10.5, thresholds=heights)
    part = only(place(tmp_path / "none", bare | extra, use_decoder_bias=False))
    assert not part.b_dec.any()
    agrees(part, x, wanted)


# Llama Scope R1 Distill


def test_r1_distill_by_hand(tmp_path):
    """The scales of Llama Scope, by hand above; a threshold counts at the scale of the output."""
    more = {
        "log_jumprelu_threshold": tensor(0.0, 1.0, -1.0),
        f"dataset_average_activation_norm.{MLP_IN}": torch.tensor(4.0),
        f"dataset_average_activation_norm.{MLP_OUT}": torch.tensor([8.0]),
    }
    hooks = {"hook_point_in": MLP_IN, "hook_point_out": MLP_OUT}
    sizes = {"d_model": 4, "expansion_factor": 0.75}
    folder = r1_distill(tmp_path, by_hand() | more, **sizes, **hooks)
    part = only(folder)
    assert torch.equal(part.w_enc, W_ENC)
    assert torch.equal(part.b_enc, B_ENC)
    assert torch.equal(part.w_dec, W_DEC)
    assert torch.equal(part.b_dec, B_DEC)
    torch.testing.assert_close(part.threshold, 4 * tensor(1.0, 2.718281828, 0.367879441))
    facts = formats.inspect(folder)
    assert (facts.kind, facts.layout) == ("transcoder", "llama-scope-r1-distill")


@pytest.mark.parametrize("hooks", [(HOOK, HOOK), (MLP_IN, MLP_OUT)])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
def test_r1_distill_folded_is_unfolded(tmp_path, hooks, by_norm, act_fn):
    w, x = drawn(3)
    norms = {hooks[0]: 10.5, hooks[1]: 10.5 if hooks[0] == hooks[1] else 3.4}
    tensors = linear(w)
    more = {f"dataset_average_activation_norm.{h}": torch.tensor(n) for h, n in norms.items()}
    if act_fn == "jumprelu":
        more["log_jumprelu_threshold"] = w["threshold"].log()
    changes = {"sparsity_include_decoder_norm": by_norm, "act_fn": act_fn}
    changes |= {"hook_point_in": hooks[0], "hook_point_out": hooks[1]}
    heights = w["threshold"].log().double().exp()
    wanted = openmoss_unfolded(
        x, tensors, R1 | changes, norms[hooks[0]], norms[hooks[1]], thresholds=heights
    )
    agrees(only(r1_distill(tmp_path, tensors | more, **changes)), x, wanted)


# Sparsify


def eleuther(w, *, skip=False):
    named = {"encoder.weight": w["w_enc"].T, "encoder.bias": w["b_enc"]}
    named |= {"W_dec": w["w_dec"], "b_dec": w["b_dec"]}
    return named | ({"W_skip": w["skip"].T} if skip else {})


@pytest.mark.parametrize(
    ("changes", "kind", "less_bias"),
    [
        ({}, "sae", True),
        ({"transcode": True}, "transcoder", False),
        ({"transcode": True, "skip_connection": True}, "transcoder", False),
    ],
)
def test_sparsify_folded_is_unfolded(tmp_path, changes, kind, less_bias):
    w, x = drawn(8)
    skip = "skip_connection" in changes
    folder = sparsify(tmp_path, eleuther(w, skip=skip), **changes)
    agrees(only(folder), x, plain_unfolded(x, w, less_bias=less_bias, k=7, skip=skip))
    facts = formats.inspect(folder)
    assert (facts.kind, facts.activation, facts.affine) == (kind, "topk", skip)
    assert (facts.reads, facts.writes, facts.model) == (None, None, None)


def test_sparsify_before_its_transcoders_had_a_setting(tmp_path):
    """They took the bias from their input too, and an autoencoder cannot be told from them."""
    w, x = drawn(9)
    for skip, kind in ((True, "transcoder"), (False, None)):
        folder = sparsify(tmp_path / str(skip), eleuther(w, skip=skip), skip_connection=skip)
        config = json.loads((folder / "cfg.json").read_text())
        for name in ("transcode", "activation", "multi_topk"):
            del config[name]
        (folder / "cfg.json").write_text(json.dumps(config))
        agrees(only(folder), x, plain_unfolded(x, w, less_bias=True, k=7, skip=skip))
        assert formats.inspect(folder).kind == kind


# dictionary_learning

CLASSES = {
    "AutoEncoder": ("bias", True, None),
    "AutoEncoderNew": ("decoder.bias", False, None),
    "AutoEncoderTopK": ("b_dec", True, 7),
    "BatchTopKSAE": ("b_dec", True, None),
    "MatryoshkaBatchTopKSAE": (None, True, None),
    "JumpReluAutoEncoder": (None, False, None),
}


def saved_state(name, w):
    """The state of one of the library's modules, as it saves it."""
    bias, _, _ = CLASSES[name]
    state = linear(w, bias=bias) if bias else capital(w)
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        state |= {"k": torch.tensor(7, dtype=torch.int), "threshold": torch.tensor(1.5)}
    if name == "MatryoshkaBatchTopKSAE":
        state |= {"group_sizes": torch.tensor([F // 4, F - F // 4])}
    if name == "JumpReluAutoEncoder":
        state |= {"threshold": w["threshold"]}
    return state


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning_folded_is_unfolded(tmp_path, name):
    w, x = drawn(10)
    _, less_bias, k = CLASSES[name]
    state = saved_state(name, w)
    threshold = None if name.startswith("AutoEncoder") else state["threshold"]
    folder = dictionary_learning(tmp_path, state, dict_class=name)
    wanted = plain_unfolded(x, w, less_bias=less_bias, threshold=threshold, k=k)
    agrees(only(folder), x, wanted)
    facts = formats.inspect(folder)
    assert (facts.kind, facts.d_in, facts.d_sae, facts.dtype) == ("sae", D, F, "float32")
    assert facts.activation == ("jumprelu" if threshold is not None else "topk" if k else "relu")
    assert (facts.reads, facts.writes, facts.model) == (RESID, RESID, "EleutherAI/pythia-70m")


def test_dictionary_learning_as_a_module_saves_it(tmp_path):
    """An ordered state with its versions, parameters, and tensors that share and stride."""
    w, x = drawn(11)
    module = torch.nn.Module()
    module.encoder = torch.nn.Linear(D, F)
    module.decoder = torch.nn.Linear(F, D, bias=False)
    module.b_dec = torch.nn.Parameter(w["b_dec"])
    module.encoder.weight.data = w["w_enc"].T
    module.encoder.bias.data = w["b_enc"]
    module.decoder.weight.data = w["w_dec"].T
    for name, value in (("k", torch.tensor(7)), ("threshold", torch.tensor(1.5))):
        module.register_buffer(name, value)
    folder = dictionary_learning(tmp_path, module.state_dict())
    agrees(only(folder), x, plain_unfolded(x, w, less_bias=True, threshold=torch.tensor(1.5)))


def test_dictionary_learning_takes_the_bias_from_the_input_where_it_says_so(tmp_path):
    w, x = drawn(12)
    state = saved_state("JumpReluAutoEncoder", w)
    said = {"dict_class": "JumpReluAutoEncoder", "apply_b_dec_to_input": True}
    wanted = plain_unfolded(x, w, less_bias=True, threshold=w["threshold"])
    agrees(only(dictionary_learning(tmp_path, state, **said)), x, wanted)


@pytest.mark.parametrize(
    ("changes", "site"),
    [
        ({"submodule_name": "resid_post_layer_5"}, RESID),
        ({"submodule_name": "mlp_out_layer_5"}, Site(5, Stream.MLP_OUT)),
        ({"submodule_name": "attention_out_layer_5"}, Site(5, Stream.ATTN_OUT)),
        (
            {"submodule_name": "mlp_out", "lm_name": "openai-community/gpt2"},
            Site(5, Stream.MLP_OUT),
        ),
        # A norm follows the module there, and comes before what is added to the stream.
        ({"submodule_name": "mlp_out_layer_5", "lm_name": "google/gemma-2-2b"}, None),
        ({"lm_name": "google/gemma-2-2b"}, RESID),
        ({"submodule_name": "something"}, None),
        ({"submodule_name": None}, None),
        ({"layer": None}, None),
    ],
)
def test_dictionary_learning_sites(tmp_path, changes, site):
    w, _ = drawn()
    folder = dictionary_learning(tmp_path, saved_state("BatchTopKSAE", w), **changes)
    facts = formats.inspect(folder)
    assert (facts.reads, facts.writes) == (site, site)


# All of them


def test_every_layout_is_told_by_its_files_without_torch(tmp_path):
    w, _ = drawn()
    norm = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(9.0)}
    placed = {
        "llama-scope": llama_scope(tmp_path / "a", linear(w)),
        "llama-scope-r1-distill": r1_distill(
            tmp_path / "b", linear(w) | norm | {"log_jumprelu_threshold": w["threshold"].log()}
        ),
        "saelens": saelens(tmp_path / "c", capital(w, "threshold")),
        "sparsify": sparsify(tmp_path / "d", eleuther(w)),
    }
    looks = "; ".join(f"print(inspect(Path({str(f)!r})).layout)" for f in placed.values())
    probe = (
        "import sys; from pathlib import Path; from gemscope.formats import inspect; "
        f"{looks}; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*placed, "False"]
    pickled = dictionary_learning(tmp_path / "e", saved_state("BatchTopKSAE", w))
    assert formats.layout_of(pickled).name == "dictionary-learning"
    assert {*placed, "dictionary-learning"} < {x.name for x in formats.LAYOUTS}


def test_files_made_by_hand_are_files_of_the_format():
    from safetensors.torch import load

    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16(), "c": torch.tensor(2.0)}
    found = load(stored(tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize("stream", list(Stream))
def test_sites_in_the_words_of_transformer_lens(stream):
    site = Site(0 if stream is Stream.EMBED else 17, stream)
    assert site_of_transformer_lens(transformer_lens_hook(site)) == site


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_embed", "0.embed"),
        ("blocks.3.hook_resid_mid", "3.resid_mid"),
        ("blocks.3.attn.hook_z", "3.attn_heads"),
        ("blocks.3.hook_attn_out", "3.attn_out"),
        ("blocks.3.mlp.hook_post", "3.mlp_hidden"),
        ("blocks.3.mlp.hook_in", "3.mlp_in"),
        ("blocks.3.ln2.hook_normalized", "3.mlp_in_unscaled"),
        ("blocks.3.hook_mlp_in", None),
        ("blocks.3.ln1.hook_normalized", None),
        ("blocks.-3.hook_resid_pre", None),
        ("blocks.99999.hook_resid_pre", None),
        ("blocks.٣.hook_resid_pre", None),
        ("blocks.3.hook_resid_pre\n", None),
        ("", None),
    ],
)
def test_hooks_of_transformer_lens(hook, site):
    assert site_of_transformer_lens(hook) == (Site.parse(site) if site else None)
