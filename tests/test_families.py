"""Every family of models, tiny and random, against `transformers` and hooks written by hand."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from gemscope import miniature as bundled
from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel, load_model
from gemscope.sites import FAMILIES, Site, Stream

TEXT = "def area(width, height):\n    return width * height  # in metres\n"
LAYER = 1
"""The middle one of three."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# Twelve a head: four heads are wider than the model.
WIDE = GROUPED | {"head_dim": 12}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

MODELS = {
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WIDE)),
    # A cap that small numbers feel, and the attention that knows of it.
    "gemma-2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**WIDE, attn_logit_softcapping=1.0, attn_implementation="eager")
    ),
    "gemma-3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE)),
    "gemma-3 with eyes": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=WIDE, vision_config=EYES, mm_tokens_per_image=4)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)),
    "gpt-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=4096, n_positions=64)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
}
GEMMAS = ("gemma", "gemma-2", "gemma-3", "gemma-3 with eyes")

# Where each stream of the middle layer is, by names of `transformers`. Wherever the same tensor
# passes by twice, the other place than the one gemscope takes it from.
LLAMA_BLOCK = {
    "embed": "model.embed_tokens output",
    "resid_pre": "model.layers.0 output",
    "attn_heads": "model.layers.1.self_attn.o_proj input",
    "attn_out": "model.layers.1.self_attn output",
    "resid_mid": "model.layers.1.post_attention_layernorm input",
    "mlp_in": "model.layers.1.mlp input",
    "mlp_hidden": "model.layers.1.mlp.down_proj input",
    "mlp_out": "model.layers.1.mlp.down_proj output",
    "resid_post": "model.layers.2 input",
}
SANDWICH = LLAMA_BLOCK | {
    "embed": "model.layers.0.input_layernorm input",
    "attn_out": "model.layers.1.post_attention_layernorm output",
    "resid_mid": "model.layers.1.pre_feedforward_layernorm input",
    "mlp_out": "model.layers.1.post_feedforward_layernorm output",
}
PLACES = {
    "gemma": LLAMA_BLOCK | {"embed": "model.layers.0.input_layernorm input"},
    "gemma-2": SANDWICH,
    "gemma-3": SANDWICH,
    "gemma-3 with eyes": {
        stream: place.replace("model.", "model.language_model.")
        for stream, place in SANDWICH.items()
    },
    "llama": LLAMA_BLOCK,
    "qwen2": LLAMA_BLOCK,
    "qwen3": LLAMA_BLOCK,
    "gpt-2": {
        "embed": "transformer.wte output",
        "resid_pre": "transformer.h.0 output",
        "attn_heads": "transformer.h.1.attn.c_proj input",
        "attn_out": "transformer.h.1.attn output",
        "resid_mid": "transformer.h.1.ln_2 input",
        "mlp_in": "transformer.h.1.mlp input",
        "mlp_hidden": "transformer.h.1.mlp.c_proj input",
        "mlp_out": "transformer.h.1.mlp.c_proj output",
        "resid_post": "transformer.h.2 input",
    },
    "gpt-neox": {
        "embed": "gpt_neox.embed_in output",
        "resid_pre": "gpt_neox.layers.0 output",
        "attn_heads": "gpt_neox.layers.1.attention.dense input",
        "attn_out": "gpt_neox.layers.1.attention output",
        "mlp_in": "gpt_neox.layers.1.mlp input",
        "mlp_hidden": "gpt_neox.layers.1.mlp.dense_4h_to_h input",
        "mlp_out": "gpt_neox.layers.1.mlp.dense_4h_to_h output",
        "resid_post": "gpt_neox.layers.2 input",
    },
}
NORMS = dict.fromkeys(MODELS, "model.layers.1.post_attention_layernorm") | {
    "gemma-2": "model.layers.1.pre_feedforward_layernorm",
    "gemma-3": "model.layers.1.pre_feedforward_layernorm",
    "gemma-3 with eyes": "model.language_model.layers.1.pre_feedforward_layernorm",
    "gpt-2": "transformer.h.1.ln_2",
    "gpt-neox": "gpt_neox.layers.1.post_attention_layernorm",
}
"""The norm before the MLP."""


def randomised(model):
    """No parameter is left at a value that hides it: gains of one, biases of zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def wrapped(model):
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    return LanguageModel(randomised(model), tokenizer)


@pytest.fixture(scope="module")
def models():
    return {name: wrapped(build()) for name, build in MODELS.items()}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(models, name):
    return models[name]


def at(stream, layer=LAYER):
    return Site(0 if stream == "embed" else layer, Stream(stream))


class Noted:
    """Tensors at places such as `model.layers.1 input`, noted while the context lasts."""

    def __init__(self, model, places):
        self.model, self.places, self.seen = model, places, {}

    def __enter__(self):
        self.hooks = [self._hook(*item) for item in self.places.items()]
        return self.seen

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _hook(self, key, place):
        path, end = place.split()
        module = self.model.get_submodule(path)

        def note(value):
            self.seen[key] = (value[0] if isinstance(value, tuple) else value).clone()

        if end == "output":
            return module.register_forward_hook(lambda m, a, out: note(out))
        return module.register_forward_pre_hook(
            lambda m, a, k: note(a if a else k["hidden_states"]), with_kwargs=True
        )


def by_hand(model, name, text=TEXT):
    """The streams of the middle layer, and the logits, of the plain model."""
    with Noted(model.hf, PLACES[name]) as seen:
        logits = model.hf(model.tokens(text).ids).logits
    return seen, logits


def gain_and_shift(model, name):
    norm = model.hf.get_submodule(NORMS[name])
    if name in GEMMAS:
        return 1 + norm.weight, 0
    return norm.weight, getattr(norm, "bias", 0)


def mlp_by_hand(model, name):
    """The middle layer's MLP, written out: the modules carry the hooks of the run under way."""
    block = model.hf.get_submodule(NORMS[name].rpartition(".")[0])
    mlp = block.mlp
    if name == "gpt-2":  # [in, out]
        first, last = mlp.c_fc, mlp.c_proj
        return lambda x: (
            F.gelu(x @ first.weight + first.bias, approximate="tanh") @ last.weight + last.bias
        )
    if name == "gpt-neox":
        first, last = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        return lambda x: F.gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias

    def gated(x):
        gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
        gate = F.gelu(gate, approximate="tanh") if name in GEMMAS else F.silu(gate)
        y = (gate * up) @ mlp.down_proj.weight.T
        if PLACES[name]["mlp_out"].endswith("mlp.down_proj output"):
            return y
        norm = block.post_feedforward_layernorm
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)

    return gated


def test_no_family_is_left_out(models):
    assert {m.family.name for m in models.values()} == {f.name for f in FAMILIES}
    types = {m.config.model_type for m in models.values()}
    assert types == {t for f in FAMILIES for t in f.model_types}


def test_every_stream_is_the_tensor_the_block_computes(model, name):
    seen, _ = by_hand(model, name)
    assert {*seen, "mlp_in_unscaled"} == {*model.family.taps}
    run = model.run(TEXT, read=map(at, seen))
    for stream, expected in seen.items():
        assert torch.equal(run[at(stream)], expected), stream
        assert model.width(at(stream)) == expected.shape[-1], stream
    assert model.width(at("mlp_in_unscaled")) == 32


def test_the_streams_add_up(model, name):
    x = model.run(TEXT, read=map(at, PLACES[name]))
    before, attention, mlp, after = (
        x[at(s)] for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    if name == "gpt-neox":  # side by side; the order of the sum is the library's to choose
        torch.testing.assert_close(before + attention + mlp, after)
        return
    assert torch.equal(x[at("resid_mid")], before + attention)
    assert torch.equal(after, x[at("resid_mid")] + mlp)


def test_the_gain_is_what_the_family_makes_of_the_weight(model, name):
    run = model.run(TEXT, read=[at("mlp_in"), at("mlp_in_unscaled")])
    scaled, unscaled = run[at("mlp_in")], run[at("mlp_in_unscaled")]
    gain, shift = gain_and_shift(model, name)
    torch.testing.assert_close(scaled, unscaled * gain + shift)
    # The other convention is not nearly right.
    other = gain - 1 if name in GEMMAS else gain + 1
    assert (scaled - (unscaled * other + shift)).abs().max() > 1
    # Of unit mean square, up to the norm's epsilon, and centred where the family centres.
    square = unscaled.square().mean(-1)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=0)
    assert (unscaled.mean(-1).abs().max() < 1e-5) == (name in ("gpt-2", "gpt-neox"))


def test_without_edits_a_run_is_bit_equal_to_transformers(model, name):
    texts = [TEXT, "x = 1"]
    ids = model.tokens(texts).ids
    reads = [Site(layer, s) for layer in range(3) for s in model.family.taps if s != "embed"]
    assert torch.equal(model.run(texts, read=reads, logits=True).logits, model.hf(ids).logits)
    assert torch.equal(model.run(texts, logits=True).logits, model.hf(ids).logits)


def test_putting_back_what_was_read_changes_nothing(model, name):
    _, logits = by_hand(model, name)
    for stream in PLACES[name]:
        where = at(stream)
        same = model.run(TEXT, edits=[Edit(where, where, lambda x: x)], logits=True).logits
        assert torch.equal(same, logits), stream
        other = model.run(TEXT, edits=[Edit(where, where, lambda x: -x)], logits=True).logits
        assert (other - logits).abs().max() > 1e-3, stream


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # Float32: a sum's rounding. Bfloat16: some norms round before the gain and after it, where
    # gemscope rounds once; three halves of a unit in the last place of 2 ** -8 are under 2 ** -7.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)],
)
def test_a_gain_free_edit_arrives_with_gain_and_bias(model, name, dtype, rtol):
    model = LanguageModel(deepcopy(model.hf).to(dtype), model.tokenizer)
    where, place = at("mlp_in_unscaled"), {"mlp_in": PLACES[name]["mlp_in"]}
    seen, logits = by_hand(model, name)
    with Noted(model.hf, place) as same:
        run = model.run(TEXT, edits=[Edit(where, where, lambda x: x)], logits=True)
    assert run.logits.dtype == dtype
    torch.testing.assert_close(same["mlp_in"], seen["mlp_in"], rtol=rtol, atol=1e-5)
    if dtype is torch.float32:
        torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stream", ["mlp_in", "mlp_in_unscaled"])
def test_a_transcoder_without_error_is_the_mlp(model, name, stream):
    mlp, (gain, shift) = mlp_by_hand(model, name), gain_and_shift(model, name)
    if stream == "mlp_in":
        gain, shift = 1, 0
    transcoder = Edit(at(stream), at("mlp_out"), lambda x: mlp(x * gain + shift))
    plain = model.run(TEXT, logits=True).logits
    same = model.run(TEXT, edits=[transcoder], logits=True).logits
    # Sums of some fifty products, about six layers deep: 300 roundings of logits of about ten.
    torch.testing.assert_close(same, plain, rtol=0, atol=300 * 2**-24 * 10)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt-neox"], indirect=True)
def test_what_is_written_between_attention_and_mlp_goes_past_the_mlp_too(model, name):
    middle, after = at("resid_mid"), at("resid_post")
    run = model.run(TEXT, read=[middle, after], edits=[Edit(middle, middle, lambda x: -x)])
    turned = -run[middle]
    norm = model.hf.get_submodule(NORMS[name])
    expected = turned + mlp_by_hand(model, name)(norm(turned))
    torch.testing.assert_close(run[after][:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GEMMAS, indirect=True)
def test_gemma_embeds_are_scaled_once(model, name):
    batch = model.tokens(TEXT)
    rows = model.hf.get_input_embeddings().weight[batch.ids]
    assert torch.equal(model.run(batch, read=[at("embed")])[at("embed")], rows * 32**0.5)


FINAL = {
    # The final norm, the last attention's projection, and the norm after it.
    "gemma-2": ("model.norm", "model.layers.2.self_attn.o_proj", "post_attention_layernorm"),
    "llama": ("model.norm", "model.layers.2.self_attn.o_proj", None),
    "gpt-2": ("transformer.ln_f", "transformer.h.2.attn.c_proj", None),
}


@pytest.mark.parametrize("stream", ["resid_post", "attn_heads"])
@pytest.mark.parametrize("name", FINAL, indirect=True)
def test_direct_logits_are_the_derivative_but_for_the_denominators(model, name, stream):
    """Along directions that leave the norms' denominators alone, they are all of it."""
    run = model.run(TEXT, read=[at(stream, 2), at("resid_pre", 2)])
    value, below = (run[at(s, 2)][0, -1].double() for s in (stream, "resid_pre"))
    double = deepcopy(model.hf).double()
    norm, projection = map(double.get_submodule, FINAL[name][:2])
    post = FINAL[name][2] and double.model.layers[2].get_submodule(FINAL[name][2])

    def denominator(x):
        return (x.var(correction=0) if name == "gpt-2" else x.square().mean()).sqrt()

    def forward(x):
        """Logits before a soft-cap, and the denominators on the way to them."""
        sizes = []
        if stream == "attn_heads":
            x = projection(x)
            if post:
                sizes.append(denominator(x))
                x = post(x)
            x = below + x
        sizes.append(denominator(x))
        return double.get_output_embeddings()(norm(x)), torch.stack(sizes)

    slopes = torch.func.jacrev(lambda x: forward(x)[1])(value)
    direction = torch.randn(len(value), generator=torch.Generator().manual_seed(2)).double()
    direction -= torch.linalg.pinv(slopes) @ (slopes @ direction)
    (_, sizes), (moved, _) = torch.func.jvp(forward, (value,), (direction,))
    got = model.direct_logits(direction[None], at(stream, 2))[0]
    # The norms' epsilon, left out of the denominators here, is some 1e-6 of them.
    torch.testing.assert_close(got.double(), moved * sizes.prod(), rtol=1e-4, atol=1e-4)
    assert got.abs().max() > 1


def test_parallel_blocks_refuse_what_lies_between(models):
    model, middle, after = models["gpt-neox"], at("resid_mid"), at("resid_post")
    refused = pytest.raises(
        InputError, match=r"^models of the gpt-neox family have no resid_mid; they have resid_pre, "
    )
    with refused:
        model.width(middle)
    with refused:
        model.run(TEXT, read=[middle])
    with refused:
        model.run(TEXT, edits=[Edit(middle, after, lambda x: x)], logits=True)


def test_widths_that_a_configuration_leaves_open():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 4096}
    for inner, width in ((None, 128), (40, 40)):
        model = wrapped(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_inner=inner)))
        where = Site(0, Stream.MLP_HIDDEN)
        assert model.run(TEXT, read=[where])[where].shape[-1] == model.width(where) == width
    model.config.head_dim = None
    assert model.width(Site(0, Stream.ATTN_HEADS)) == 32


def saved(model, folder):
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_saved_model_is_loaded_and_is_the_same(model, name, tmp_path):
    loaded = load_model(saved(model, tmp_path), device="cpu")
    assert type(loaded.hf) is type(model.hf)
    assert (loaded.family, loaded.max_context, loaded.n_layers) == (model.family, 64, 3)
    where, batch = at("resid_post"), model.tokens(TEXT)
    expected = model.run(batch, read=[where], logits=True)
    assert torch.equal(loaded.run(batch, logits=True).logits, expected.logits)
    assert torch.equal(loaded.run(batch, read=[where])[where], expected[where])


def test_float16_where_activations_fit(model, name, tmp_path):
    folder = saved(model, tmp_path)
    if name.startswith("gemma-3"):
        with pytest.raises(InputError, match="gemma-3 overflow float16; use bfloat16 or float32"):
            load_model(folder, device="cpu", dtype="float16")
    else:
        assert load_model(folder, device="cpu", dtype="float16").dtype == torch.float16
