"""Reading, splicing and editing against hand-written hooks on the plain transformers model."""

import pytest
import torch

from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel, load_model, replace, splice
from gemscope.sites import FAMILIES, Site, Stream

TEXT = """class Reader:
    def __init__(self, path):
        self.path = path  # where the lines are
"""


def site(text):
    return Site.parse(text)


def by_hand(model, text):
    """Every stream of layer 2, from the modules, the way the block computes it."""
    hf, seen = model.hf, {}
    layer = hf.model.layers[2]

    def note(name, value):
        seen[name] = (value[0] if isinstance(value, tuple) else value).detach().clone()

    hooks = [
        hf.model.embed_tokens.register_forward_hook(lambda m, a, o: note("embed", o)),
        layer.register_forward_pre_hook(lambda m, a: note("resid_pre", a[0])),
        layer.register_forward_hook(lambda m, a, o: note("resid_post", o)),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: note("attn_heads", a[0])),
        layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: note("attn_out", o)),
        layer.pre_feedforward_layernorm.register_forward_pre_hook(
            lambda m, a: note("resid_mid", a[0])
        ),
        layer.pre_feedforward_layernorm.register_forward_hook(lambda m, a, o: note("mlp_in", o)),
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: note("mlp_hidden", a[0])),
        layer.post_feedforward_layernorm.register_forward_hook(lambda m, a, o: note("mlp_out", o)),
    ]
    with torch.no_grad():
        logits = hf(model.tokenizer(text, return_tensors="pt").input_ids).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def test_every_stream_is_the_tensor_the_block_computes(miniature):
    seen, _ = by_hand(miniature, TEXT)
    for name, expected in seen.items():
        where = Site(0 if name == "embed" else 2, Stream(name))
        got = miniature.run(TEXT, read=[where])[where]
        assert torch.equal(got, expected), name
        assert got.shape[-1] == miniature.width(where)


def test_the_streams_add_up(miniature):
    streams = {s: Site(2, s) for s in Stream if s is not Stream.EMBED}
    run = miniature.run(TEXT, read=streams.values())
    x = {s: run[where] for s, where in streams.items()}
    assert torch.equal(x[Stream.RESID_MID], x[Stream.RESID_PRE] + x[Stream.ATTN_OUT])
    assert torch.equal(x[Stream.RESID_POST], x[Stream.RESID_MID] + x[Stream.MLP_OUT])
    gain = 1 + miniature.stack.layers[2].pre_feedforward_layernorm.weight.float()
    torch.testing.assert_close(
        x[Stream.MLP_IN], x[Stream.MLP_IN_UNSCALED] * gain, rtol=1e-5, atol=1e-5
    )
    # Gain-free: of unit mean square, up to the norm's epsilon.
    square = x[Stream.MLP_IN_UNSCALED].square().mean(-1)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=0)


def test_without_edits_a_run_is_bit_equal_to_transformers(miniature):
    _, logits = by_hand(miniature, TEXT)
    reads = [Site(layer, s) for layer in range(6) for s in Stream if s is not Stream.EMBED]
    assert torch.equal(miniature.run(TEXT, read=reads, logits=True).logits, logits)


def test_putting_back_what_was_read_changes_nothing(miniature):
    _, logits = by_hand(miniature, TEXT)
    for stream in Stream:
        if stream is Stream.MLP_IN_UNSCALED:
            continue  # its gain is multiplied in again in float32: equal up to rounding
        where = Site(0 if stream is Stream.EMBED else 2, stream)
        same = miniature.run(TEXT, edits=[Edit(where, where, lambda x: x)], logits=True)
        assert torch.equal(same.logits, logits), stream


def test_gain_free_edits_arrive_with_the_gain(miniature):
    where = site("2.mlp_in_unscaled")
    same = miniature.run(TEXT, edits=[Edit(where, where, lambda x: x)], logits=True)
    _, logits = by_hand(miniature, TEXT)
    torch.testing.assert_close(same.logits, logits, rtol=0, atol=1e-4)
    other = miniature.run(TEXT, edits=[Edit(where, where, lambda x: -x)], logits=True)
    assert (other.logits - logits).abs().max() > 0.5


def test_a_splice_is_the_hand_written_one(miniature, residual):
    ids = miniature.tokenizer(TEXT, return_tensors="pt").input_ids

    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = x.clone()
        pre = x[:, 1:] @ residual.w_enc.float() + residual.b_enc.float()
        f = pre * (pre > residual.activation.threshold)
        new[:, 1:] = f @ residual.w_dec.float() + residual.b_dec.float()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = miniature.hf.model.layers[residual.reads.layer].register_forward_hook(hook)
    with torch.no_grad():
        expected = miniature.hf(ids).logits
    handle.remove()
    got = miniature.run(TEXT, edits=[splice(residual)], logits=True).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    plain = miniature.run(TEXT, logits=True).logits
    assert torch.equal(got[:, 0], plain[:, 0]), "BOS is never spliced"
    assert (got[:, 1:] - plain[:, 1:]).abs().max() > 0.01


def test_a_transcoder_reads_one_site_and_writes_another(miniature):
    reads, writes = site("1.mlp_in"), site("1.mlp_out")
    block = miniature.stack.layers[1]
    weights = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight]
    norm = block.post_feedforward_layernorm

    def mlp(x):
        # Written out: the modules carry the hooks of the run that is under way.
        gate, up, down = weights
        y = (torch.nn.functional.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
        return y * (1 + norm.weight)

    plain = miniature.run(TEXT, logits=True).logits
    same = miniature.run(TEXT, edits=[Edit(reads, writes, mlp)], logits=True).logits
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)


def test_a_site_is_read_before_its_own_edit_and_after_earlier_ones(miniature):
    early, late = site("1.resid_post"), site("4.resid_post")
    zero = replace(early, torch.zeros(miniature.width(early)))
    run = miniature.run(TEXT, read=[early, late], edits=[zero])
    plain = miniature.run(TEXT, read=[early, late])
    assert torch.equal(run[early], plain[early])
    assert not torch.equal(run[late], plain[late])


def test_layers_after_the_last_site_do_not_run(miniature):
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, layer in enumerate(miniature.stack.layers)
    ]
    miniature.run(TEXT, read=[site("1.resid_mid"), site("2.resid_mid")])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2]


def test_hooks_are_gone_after_a_run_and_after_a_failure(miniature):
    _, logits = by_hand(miniature, TEXT)

    def fail(x):
        raise RuntimeError("on purpose")

    where = site("2.resid_post")
    with pytest.raises(RuntimeError, match="on purpose"):
        miniature.run(TEXT, edits=[Edit(where, where, fail)], logits=True)
    assert torch.equal(miniature.run(TEXT, logits=True).logits, logits)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None)])
def test_layers_may_return_a_tensor_or_a_tuple(miniature, wrap):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return wrap(x * 2)

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])

    from gemscope.lm._frame import Frame
    from gemscope.lm._hooks import Taps

    where, stack, x = site("0.resid_post"), Stack(), torch.ones(1, 3, 4)
    taps = Taps(stack, FAMILIES[0])
    counts = torch.tensor([[False, True, True]])
    ends = torch.tensor([3])
    frame = Frame(counts, pads=ends * 0, ends=ends, prompt_lengths=ends, specials=ends * 0)
    frame.begin(torch.ones(1, 3, dtype=torch.long))
    double = Edit(where, where, lambda v: v * 10)
    with taps.attached([where], [double], frame, stop=False):
        out = stack.layers[0](x)
    out = out[0] if isinstance(out, tuple) else out
    assert torch.equal(taps.values[where], 2 * x)
    assert out[0, :, 0].tolist() == [2, 20, 20]


def test_direct_logits_are_the_derivative_without_the_norm(miniature):
    """Adding a little of a direction to the final stream moves the logits along `direct_logits`."""
    where = site("5.resid_post")
    x = miniature.run(TEXT, read=[where])[where][:, -1:].double()
    direction = torch.randn(1, 256, generator=torch.Generator().manual_seed(3)).double()
    norm, head = miniature.stack.norm, miniature.hf.lm_head.weight.double()
    rms = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    gain = 1 + norm.weight.double()
    moved = (((x + 1e-6 * direction) / rms - x / rms) * gain) @ head.T / 1e-6 * rms
    got = miniature.direct_logits(direction, where)
    torch.testing.assert_close(got, moved[0].float(), rtol=1e-3, atol=1e-3)
    heads = torch.randn(1, 256, generator=torch.Generator().manual_seed(4))
    block = miniature.stack.layers[2]
    through = (block.self_attn.o_proj(heads)) * (1 + block.post_attention_layernorm.weight)
    torch.testing.assert_close(
        miniature.direct_logits(heads, site("2.attn_heads")),
        miniature.direct_logits(through, where),
        rtol=1e-4,
        atol=1e-4,
    )
    assert miniature.direct_logits(heads, site("2.mlp_in")) is None


def test_dictionaries_of_other_models_and_widths_are_refused(miniature, residual):
    from dataclasses import replace as change

    foreign = change(residual, origin=change(residual.origin, model="google/gemma-3-1b-pt"))
    with pytest.raises(InputError, match=r"belongs to google/gemma-3-1b-pt, not to gemscope"):
        miniature.check(foreign)
    with pytest.raises(InputError, match="its layers are 0 to 5"):
        miniature.check(change(residual, reads=site("6.resid_post")))
    with pytest.raises(InputError, match=r"256 numbers at 2\.mlp_hidden, where"):
        miniature.check(change(residual, reads=site("2.mlp_hidden")))


def test_models_that_cannot_be_loaded_are_told():
    with pytest.raises(InputError, match="overflow float16; use bfloat16 or float32"):
        load_model("miniature", dtype="float16")
    with pytest.raises(InputError, match="no such dtype: 'int4'"):
        load_model("miniature", dtype="int4")
    with pytest.raises(InputError, match="nobody/nothing is not in the cache, and HF_HUB_OFFLINE"):
        load_model("nobody/nothing")


def test_gradients_reach_an_edit(miniature):
    where, leaves = site("2.resid_post"), []

    def leaf(x):
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        logits = miniature.run(TEXT, edits=[Edit(where, where, leaf)], logits=True).logits
        (gradient,) = torch.autograd.grad(logits[0, -1, 7], leaves)
    x = leaves[0].detach()
    # A central difference along one direction; float32 logits leave about three digits of it.
    direction = torch.nn.functional.normalize(gradient, dim=-1)
    step = 0.05
    ends = [
        miniature.run(TEXT, edits=[Edit(where, where, lambda _, to=to: to)], logits=True)
        for to in (x + step * direction, x - step * direction)
    ]
    slope = (ends[0].logits[0, -1, 7] - ends[1].logits[0, -1, 7]) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.05)


def test_a_model_is_known_by_its_name_and_not_by_its_folder():
    from gemscope import miniature as bundled

    assert load_model("miniature").name == bundled.MODEL_NAME
    assert load_model(str(bundled.MODEL)).name == bundled.MODEL_NAME
    assert isinstance(load_model("miniature"), LanguageModel)
