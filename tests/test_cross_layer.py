"""Models over several layers: against their formula in float64, and spliced against plain hooks."""

from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch

from gemscope.errors import InputError
from gemscope.lm import splice
from gemscope.sae import CrossLayer, Layer, SparseFeatures
from gemscope.sae import _encode as module
from gemscope.sites import Sites

COUNTS, D_IN, D_OUT = (5, 1, 40), 12, 9
MLP_IN, MLP_OUT = Sites.parse("0-5.mlp_in"), Sites.parse("0-5.mlp_out")
RESIDUALS = Sites.parse("1,3,4.resid_post")
TEXTS = ["class Reader:\n    def __init__(self, path):\n        self.path = path\n", "import os"]


def made(
    counts=COUNTS, d_in=D_IN, d_out=D_OUT, *,
    reads="1,3,4.mlp_in", writes="1,3,4.mlp_out", dtype=torch.float32, skip=False, seed=0,
):  # fmt: skip
    """A model of random numbers, with NaN wherever the formula never looks."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    layers = []
    for place, count in enumerate(counts):
        w_dec = drawn(count, len(counts), d_out)
        w_dec[:, :place] = torch.nan
        layers.append(
            Layer(
                w_enc=drawn(d_in, count, scale=d_in**-0.5),
                b_enc=drawn(count, scale=0.3),
                threshold=torch.rand(count, generator=g),
                w_dec=w_dec,
                b_dec=drawn(d_out),
                skip=drawn(d_in, d_out, scale=0.1) if skip else None,
            )
        )
    return CrossLayer(layers=tuple(layers), reads=Sites.parse(reads), writes=Sites.parse(writes))


def inputs(n=50, d_in=D_IN, n_layers=len(COUNTS)):
    return torch.randn(n, n_layers, d_in, generator=torch.Generator().manual_seed(1))


def features_of(layer, x):
    """`relu-jump(x @ w_enc + b_enc)` of one layer in float64, and the bound on its rounding."""
    w, b = layer.w_enc.double(), layer.b_enc.double()
    pre, sizes = x.double() @ w + b, x.double().abs() @ w.abs() + b.abs()
    bound = (len(w) + 2) * 2.0**-24 * sizes
    assert ((pre - layer.threshold.double()).abs() > bound).all(), "all is decided"
    return pre * (pre > layer.threshold.double()) * (pre > 0), bound


def reference(model, x):
    """Features of each layer, what is written in each, and bounds on the rounding of both."""
    found = [features_of(layer, x[:, place]) for place, layer in enumerate(model.layers)]
    out, bounds = [], []
    for m, layer in enumerate(model.layers):
        y = layer.b_dec.double().expand(len(x), -1)
        sizes, error = y.abs(), torch.zeros_like(y)
        for other, (f, bound) in zip(model.layers[: m + 1], found, strict=False):
            rows = other.w_dec[:, m].double()
            y, sizes = y + f @ rows, sizes + f @ rows.abs()
            error = error + (bound * (f != 0)) @ rows.abs()
        if layer.skip is not None:
            y = y + x[:, m].double() @ layer.skip.double()
            sizes = sizes + x[:, m].double().abs() @ layer.skip.double().abs()
        terms = sum(part.w_enc.shape[1] for part in model.layers) + model.d_in + 6
        out.append(y)
        bounds.append(1.01 * error + terms * 2.0**-24 * sizes)
    features, of_features = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return features, of_features, torch.stack(out, 1), torch.stack(bounds, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("through_screen", [False, True])
def test_against_the_formula_in_float64(dtype, skip, through_screen, monkeypatch):
    monkeypatch.setattr(module, "screens_pay", lambda device: through_screen)
    monkeypatch.setattr(module, "_FEW", 1)
    model, x = made(dtype=dtype, skip=skip), inputs(1_300)  # more than is encoded at a time
    features, bound, out, bounds = reference(model, x)
    got = model.encode(x)
    assert (got.n_tokens, got.d_sae) == (1_300, 46)
    assert ((got.dense().double() - features).abs() <= bound).all()
    assert torch.equal(got.dense() != 0, features != 0)
    assert 0.1 < (features != 0).double().mean() < 0.6
    assert (got.indices.diff()[got.rows.diff() == 0] > 0).all()
    decoded = model.decode(got, x)
    assert decoded.dtype == torch.float32
    assert ((decoded.double() - out).abs() <= bounds).all()
    shaped = model.reconstruct(x.reshape(2, 650, 3, D_IN))
    assert torch.equal(shaped, decoded.reshape(2, 650, 3, D_OUT))


def test_layers_are_parts_of_the_whole():
    model, x = made(skip=True), inputs()
    assert model.firsts == [0, 5, 6, 46]
    assert (model.d_in, model.d_sae, model.d_out) == (D_IN, 46, D_OUT)
    features = model.encode(x)
    parts, decoded = model.split(features), model.decode(features, x)
    assert [part.d_sae for part in parts] == list(COUNTS)
    assert torch.equal(torch.cat([part.dense() for part in parts], 1), features.dense())
    for place, part in enumerate(parts):
        alone = model.encode_layer(x[:, place], place)
        assert torch.equal(alone.dense(), part.dense())
        assert torch.equal(alone.offsets, part.offsets)
        until = model.decode_layer(parts[: place + 1], place, x[:, place])
        assert torch.equal(until, decoded[:, place])
        # Later layers do not write here, whether they are given or not.
        assert torch.equal(model.decode_layer(parts, place, x[:, place]), until)
    assert [model.layer_of(i) for i in range(46)] == [0] * 5 + [1] + [2] * 40


def test_few_features_are_those_of_their_layers():
    model, x, few = made(dtype=torch.bfloat16), inputs(), [45, 0, 5, 6, 4]
    pre = model.pre_activations(x, few)
    rows = model.rows(few)
    assert rows.shape == (5, 3, D_OUT)
    assert pre.dtype == rows.dtype == torch.float32
    for i, (place, own) in enumerate([(2, 39), (0, 0), (1, 0), (2, 0), (0, 4)]):
        layer = model.layers[place]
        w, b = layer.w_enc[:, own].double(), layer.b_enc[own].double()
        sizes = x[:, place].double().abs() @ w.abs() + b.abs()
        off = pre[:, i].double() - (x[:, place].double() @ w + b)
        assert (off.abs() <= (D_IN + 2) * 2.0**-24 * sizes).all()
        assert torch.equal(rows[i, place:], layer.w_dec[own, place:].float())
        assert (rows[i, :place] == 0).all()


def test_no_tokens_and_no_features_are_no_trouble():
    model = made(skip=True)
    assert model.encode(inputs(0)).n_tokens == 0
    assert model.reconstruct(inputs(0)).shape == (0, 3, D_OUT)
    quiet = [replace(layer, threshold=layer.threshold + 1e9) for layer in model.layers]
    model, x = replace(model, layers=tuple(quiet)), inputs()
    features = model.encode(x)
    assert features.indices.numel() == 0
    _, _, out, bounds = reference(model, x)
    assert ((model.decode(features, x).double() - out).abs() <= bounds).all()


def test_its_kind_is_read_off_its_sites():
    clt = made()
    assert (clt.kind, clt.is_transcoder) == ("clt", True)
    crosscoder = made(reads="1,3,4.resid_post", writes="1,3,4.resid_post", d_out=D_IN)
    assert (crosscoder.kind, crosscoder.is_transcoder) == ("crosscoder", False)


def test_it_moves_with_all_its_tensors():
    for skip in (False, True):
        model = made(skip=skip)
        assert model.to("cpu") is model
        away = model.to("meta")
        for mine, theirs in zip(model.layers, away.layers, strict=True):
            for name in (f.name for f in fields(Layer)):
                here, there = getattr(mine, name), getattr(theirs, name)
                assert (here is None) == (there is None)
                assert here is None or (there.device.type, there.shape) == ("meta", here.shape)
        assert (away.reads, away.writes, away.origin) == (model.reads, model.writes, model.origin)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("w_enc", (D_IN + 1, 1), r"w_enc of layer 1 of 3 is \[13, 1\], not \[12, 1\]"),
        ("b_enc", (2,), r"b_enc of layer 1 of 3 is \[2\], not \[1\]"),
        ("threshold", (2,), r"threshold of layer 1 of 3 is \[2\], not \[1\]"),
        ("w_dec", (1, 2, D_OUT), r"w_dec of layer 1 of 3 is \[1, 2, 9\], not \[1, 3, 9\]"),
        ("w_dec", (1, D_OUT), r"w_dec of layer 1 of 3 is \[1, 9\], not \[1, 3, 9\]"),
        ("b_dec", (3,), r"b_dec of layer 1 of 3 is \[3\], not \[9\]"),
        ("skip", (3, 3), r"skip of layer 1 of 3 is \[3, 3\], not \[12, 9\]"),
    ],
)
def test_shapes_that_contradict_each_other_are_told(name, shape, told, unchecked):
    first, second, third = made(skip=True).layers
    wrong = replace(second, **{name: torch.zeros(shape)})
    with pytest.raises(InputError, match=told):
        replace(made(), layers=(first, wrong, third))


def test_what_does_not_fit_is_told(unchecked):
    model, x = made(skip=True), inputs()
    with pytest.raises(InputError, match="2 layers for a model that reads 3 sites and writes 3"):
        replace(model, layers=model.layers[:2])
    with pytest.raises(InputError, match="3 layers for a model that reads 3 sites and writes 2"):
        replace(model, writes=Sites.parse("1,3.mlp_out"))
    with pytest.raises(InputError, match=r"1,3,4\.mlp_in and 1,3,5\.mlp_out are not of the same"):
        replace(model, writes=Sites.parse("1,3,5.mlp_out"))
    told = r"of shape \[50, 2, 12\] for a model that reads 3 layers of 12 at 1,3,4\.mlp_in"
    for ask in (model.encode, model.reconstruct, lambda y: model.pre_activations(y, [1])):
        with pytest.raises(InputError, match=told):
            ask(x[:, :2])
    with pytest.raises(InputError, match=r"of shape \[50, 12\] for a model that reads 3 layers"):
        model.encode(x[:, 0])
    with pytest.raises(InputError, match=r"skip connection: decoding it needs its input x"):
        model.decode(model.encode(x))
    with pytest.raises(InputError, match="features of width 45 for a model of 46"):
        model.decode(SparseFeatures.from_dense(torch.ones(50, 45)), x)
    for wrong in (-1, 46):
        for ask in (model.layer_of, lambda i: model.rows([0, i])):
            with pytest.raises(InputError, match="this dictionary has features 0 to 45"):
                ask(wrong)


def miniature_clt(skip=False):
    """One of the bundled model, some of whose features fire on every token."""
    model = made((8, 3, 8, 1, 8, 8), 256, 256, reads=str(MLP_IN), writes=str(MLP_OUT), skip=skip)
    # Of the size of what is in the model: edits are to be felt and not to drown everything.
    louder = [
        replace(layer, w_enc=layer.w_enc * 0.5, w_dec=layer.w_dec * 0.2, b_dec=layer.b_dec * 0.1)
        for layer in model.layers
    ]
    return replace(model, layers=tuple(louder))


def miniature_crosscoder():
    model = made((30, 4, 30), 256, 256, reads=str(RESIDUALS), writes=str(RESIDUALS))
    louder = [replace(layer, w_enc=layer.w_enc * 0.1) for layer in model.layers]
    return replace(model, layers=tuple(louder))


def written(model, seen, place):
    """What the formula writes, in float32, from the activations seen so far in a pass."""
    y = model.layers[place].b_dec
    for one, x in zip(model.layers[: place + 1], seen, strict=True):
        pre = x @ one.w_enc + one.b_enc
        y = y + (pre * (pre > one.threshold)) @ one.w_dec[:, place]
    skip = model.layers[place].skip
    return y if skip is None else y + seen[place] @ skip


@contextmanager
def by_hand(lm, model, places, counts):
    """Plain hooks that keep what is read in each layer and put in what is written at `places`."""
    seen, handles = [], []

    def keep(value):
        seen.append(value[counts].clone())

    def put(value, place):
        out = value.clone()
        out[counts] = written(model, seen[: place + 1], place)
        return out

    for place, (source, target) in enumerate(zip(model.reads, model.writes, strict=True)):
        block = lm.stack.layers[source.layer]
        if source == target:

            def both(_module, _args, output, place=place):
                value = output[0] if isinstance(output, tuple) else output
                keep(value)
                new = put(value, place) if place in places else value
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handles.append(block.register_forward_hook(both))
            continue
        norm = block.pre_feedforward_layernorm
        handles.append(norm.register_forward_hook(lambda _m, _a, output: keep(output)))
        if place in places:
            after = block.post_feedforward_layernorm
            handles.append(
                after.register_forward_hook(lambda _m, _a, output, p=place: put(output, p))
            )
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (miniature_clt(), (0, 1, 2, 3, 4, 5)),
        (miniature_clt(skip=True), (0, 1, 2, 3, 4, 5)),
        (miniature_clt(), (2,)),
        (miniature_clt(skip=True), (0, 4)),
        (miniature_clt(skip=True), (5,)),
        (miniature_crosscoder(), (0, 1, 2)),
        (miniature_crosscoder(), (1,)),
        (miniature_crosscoder(), (0, 2)),
    ],
)
def test_a_splice_is_the_hand_written_one(model, places, miniature):
    tokens = miniature.tokens(TEXTS)
    at = None if len(places) == len(model.writes) else [model.writes[p] for p in reversed(places)]
    with by_hand(miniature, model, places, tokens.counts) as seen, torch.no_grad():
        expected = miniature.hf(input_ids=tokens.ids).logits
    fires = [
        (x @ layer.w_enc + layer.b_enc > layer.threshold).float().mean()
        for x, layer in zip(seen, model.layers, strict=True)
    ]
    assert 0.02 < sum(fires) / len(fires) < 0.9
    with torch.no_grad():
        got = miniature.run(tokens, edits=[splice(model, at)], logits=True).logits
        plain = miniature.run(tokens, logits=True).logits
    real = tokens.ids != miniature.tokenizer.pad_token_id
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-3)
    assert torch.equal(got[:, 0], plain[:, 0]), "BOS is never spliced"
    assert (got - plain)[tokens.counts].abs().max() > 0.1


def test_skips_alone_that_copy_leave_the_model_as_it_is(miniature):
    quiet = [
        replace(layer, threshold=layer.threshold + 1e9, b_dec=torch.zeros(256), skip=torch.eye(256))
        for layer in miniature_crosscoder().layers
    ]
    model = replace(miniature_crosscoder(), layers=tuple(quiet))
    with torch.no_grad():
        plain = miniature.run(TEXTS, logits=True).logits
        got = miniature.run(TEXTS, edits=[splice(model)], logits=True).logits
    assert torch.equal(got, plain)


@pytest.mark.parametrize("at", [None, [MLP_OUT[1], MLP_OUT[4]]])
def test_features_are_encoded_once_in_a_pass_and_anew_in_the_next(at, miniature, monkeypatch):
    calls, encode = [], CrossLayer.encode_layer

    def counted(self, x, place):
        calls.append(place)
        return encode(self, x, place)

    monkeypatch.setattr(CrossLayer, "encode_layer", counted)
    edit = splice(miniature_clt(), at)
    for text in TEXTS:
        calls.clear()
        with torch.no_grad():
            miniature.run(text, edits=[edit], logits=True)
        assert calls == list(range(6 if at is None else 5))


def test_sites_that_are_not_written_are_refused():
    model = miniature_clt()
    with pytest.raises(
        InputError, match=r"writes 0-5\.mlp_out; name sites among them, not 2\.mlp_in"
    ):
        splice(model, [MLP_OUT[1], MLP_IN[2]])
    with pytest.raises(InputError, match=r"writes 0-5\.mlp_out; name sites among them, not none"):
        splice(model, [])
