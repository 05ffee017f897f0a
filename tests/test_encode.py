"""Encoding in tiles and through the bfloat16 screen: the float32 answer, nothing missed.

The float32 bound is the textbook one: a sum of `n` terms, in any order, errs by at most `n 2^-24`
of the sum of their sizes. A feature nearer to its threshold than that may fall either way.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.errors import InputError
from gemscope.sae import SAE, BatchTopK, CrossLayer, JumpReLU, Layer, ReLU, TopK
from gemscope.sae import _encode as module
from gemscope.sae import _screen as screening
from gemscope.sae._encode import Encoder
from gemscope.sae._kernels import row_offsets, sampled_products
from gemscope.sites import Site, Sites

HERE = Site.parse("0.resid_post")
LARGEST = torch.finfo(torch.float32).max


def screened(patch, *, tile=256, many=2.0):
    """Every encoding goes through the screen, on any processor, in tiles of `tile` features."""
    patch.setattr(module, "screens_pay", lambda device: True)
    patch.setattr(module, "_FEW", 1)
    patch.setattr(module, "_FEW_ANEW", 1)
    patch.setattr(module, "_TILE_BYTES", 0)
    patch.setattr(module, "_TILE_STEP", tile)
    patch.setattr(screening, "_MANY", many)


def exact(x, w, b):
    """Pre-activations in float64, and the bound on their float32 rounding."""
    pre = x.double() @ w.double() + b.double()
    sizes = x.double().abs() @ w.double().abs() + b.double().abs()
    return pre, (len(w) + 2) * 2.0**-24 * sizes


def fired(features):
    places = features.rows * features.d_sae + features.indices
    assert (places.diff() > 0).all(), "by token, then by feature, each once"
    mask = torch.zeros(features.n_tokens, features.d_sae, dtype=torch.bool)
    mask[features.rows, features.indices.long()] = True
    return mask


def checked(features, x, w, b, threshold):
    """Assert `features` are the float32 answer; gives what is decided by more than rounding."""
    pre, bound = exact(x, w, b)
    above = pre - threshold.double().clamp_min(0)
    decided, mask = (above.abs() > bound) | (bound == 0), fired(features)
    assert not (decided & (above > 0) & ~mask).any(), "missed"
    assert not (decided & (above <= 0) & mask).any(), "fires without being above its threshold"
    assert ((features.dense().double() - pre).abs() <= bound)[mask].all()
    return decided


def in_float32(x, w, b, threshold):
    """What the screen stands for: the same float32 products, of every entry."""
    n, d_sae = len(x), w.shape[1]
    rows = torch.arange(n).repeat_interleave(d_sae)
    columns = torch.arange(d_sae).repeat(n)
    products = sampled_products(row_offsets(rows, len(x)), columns, x, w.float().T.contiguous())
    pre = products.reshape(n, d_sae) + b.float()
    return pre * (pre > threshold.clamp_min(0))


def drawn(generator, n=40, d_in=50, d_sae=600):
    """Tokens, weights, biases and thresholds of no special kind."""
    x = torch.randn(n, d_in, generator=generator)
    w = torch.randn(d_in, d_sae, generator=generator)
    b, t = torch.randn(d_sae, generator=generator), torch.rand(d_sae, generator=generator) * 9
    return x, w, b, t


def dictionary(w, b, t, w_dec):
    b_dec = torch.ones(w_dec.shape[1])
    return SAE(
        w_enc=w, b_enc=b, w_dec=w_dec, b_dec=b_dec, activation=JumpReLU(t), reads=HERE, writes=HERE
    )  # fmt: skip


def norms(x, w, b, t, g):
    scale = 10 ** (torch.rand(w.shape[1], generator=g) * 12 - 6)
    return x, w * scale, b * scale, t * scale


def crowded(x, w, b, t, g):
    """All tokens nearly the same, all thresholds within 1e-6 of their pre-activations."""
    x = x[:1] * (1 + 1e-7 * torch.randn(x.shape, generator=g))
    pre = x[0].double() @ w.double() + b.double()
    t = pre * (1 + 1e-6 * torch.randn(w.shape[1], generator=g).double())
    return x, w, b, t.float().clamp_min(0)


def crowded_beside_large_biases(x, w, b, t, g):
    b = b * 1e4
    return x, w, b, (b + 3 * t * torch.randn(w.shape[1], generator=g)).clamp_min(0)


def crowded_in_cancelling_sums(x, w, b, t, g):
    """Thousands minus thousands is a thousandth: rounding to bfloat16 decides every sign."""
    half = w.shape[0] // 2
    x, w = x.clone(), w.clone()
    x[:, half : 2 * half] = x[:, :half]
    w[half : 2 * half] = -w[:half] * (1 + 1e-5 * torch.randn(w[:half].shape, generator=g))
    return x * 1e3, w, b * 1e-3, t * 0


def with_zeros(x, w, b, t, g):
    x, w, b = x.clone(), w.clone(), b.clone()
    x[::3], w[:, ::4], b[::5], t = 0, 0, 0, t * (torch.rand(len(t), generator=g) < 0.5)
    return x, w, b, t


def spread(x, w, b, t, g):
    """Sizes so far apart that one number of a token, and one of a column, hides all others."""
    x, w = x.clone(), w.clone()
    x[:, 0] *= 1e6
    w[1] *= 1e6
    w[0] *= 1e-6
    return x, w, b, t


def cancelled(x, w, b, t, g):
    """Sums of exactly 0 that rounding makes a little more or less."""
    half, order = w.shape[0] // 2, torch.randperm(w.shape[0] // 2, generator=g)
    x, w = x.bfloat16().float(), w.bfloat16()
    x[:, half : 2 * half] = x[:, order]
    w[half : 2 * half] = -w[order]
    x[:, 2 * half :] = 0
    return x, w, b * 0, t * 0


def crowded_below_bfloat16(x, w, b, t, g):
    """Pre-activations one step above thresholds that two bfloat16 numbers cannot hold."""
    x = torch.tensor([1, 0.0314]).bfloat16().float().expand(len(x), 2)
    w = (torch.rand(2, w.shape[1], generator=g) + 1).bfloat16()
    w[1] /= 32
    t = torch.nextafter((x[0].double() @ w.double()).float(), t * 0)
    return x, w, b * 0, torch.where(torch.arange(len(t)) % 2 == 0, t, 2 * t)


CASES = {
    "ordinary": lambda x, w, b, t, g: (x, w, b, t),
    "norms": norms,
    "huge": lambda x, w, b, t, g: (x * 1e3, w, b, t),
    "tiny": lambda x, w, b, t, g: (x * 1e-3, w, b * 1e-3, t * 1e-3),
    "representable": lambda x, w, b, t, g: (x.bfloat16().float(), w, b, t),
    "both representable": lambda x, w, b, t, g: (x.bfloat16().float(), w.bfloat16(), b, t),
    "thresholds 0": lambda x, w, b, t, g: (x, w, b, t * 0),
    "negative thresholds": lambda x, w, b, t, g: (x, w, b, t - 5),
    "no bias": lambda x, w, b, t, g: (x, w, b * 0, t * 0),
    "stored in bfloat16": lambda x, w, b, t, g: (x, w.bfloat16(), b.bfloat16(), t),
    "stored in float16": lambda x, w, b, t, g: (x, w.half(), b.half(), t),
    "crowded": crowded,
    "crowded beside large biases": crowded_beside_large_biases,
    "crowded in cancelling sums": crowded_in_cancelling_sums,
    "crowded below bfloat16": crowded_below_bfloat16,
    "crowded around cancelled sums": cancelled,
    "zeros": with_zeros,
    "spread": spread,
    # Squares of these leave float32's range, the products do not.
    "squares too large": lambda x, w, b, t, g: (x * 1e25, w, b, t * 1e25),
    "squares too large, in bfloat16": lambda x, w, b, t, g: (x * 1e25, w.bfloat16(), b, t),
    "squares of weights too large": lambda x, w, b, t, g: (
        x * (torch.arange(len(x)) % 2)[:, None], w * 1e25, b, t,
    ),
    "squares too small": lambda x, w, b, t, g: (x * 1e-22, w.bfloat16(), b * 0, t * 0),
    "squares of weights too small": lambda x, w, b, t, g: (
        x.bfloat16().float(), w * 1e-22, b * 0, t * 0,
    ),
    "some never fire": lambda x, w, b, t, g: (
        x, w, b, t.index_fill(0, torch.arange(0, len(t), 2), torch.inf),
    ),
    "some always fire": lambda x, w, b, t, g: (
        x, w, b.index_fill(0, torch.arange(0, len(t), 2), LARGEST), t,
    ),
    "some never fire, in numbers": lambda x, w, b, t, g: (
        x, w, b.index_fill(0, torch.arange(1, len(t), 3), -LARGEST),
        t.index_fill(0, torch.arange(0, len(t), 3), LARGEST),
    ),
}  # fmt: skip


@pytest.mark.parametrize("many", [2.0, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_the_screen_misses_nothing(case, many, generator, monkeypatch):
    screened(monkeypatch, many=many)
    x, w, b, t = CASES[case](*drawn(generator), generator)
    features = Encoder(w, b, JumpReLU(t)).encode(x)
    decided = checked(features, x, w, b, t)
    share = features.indices.numel() / (len(x) * w.shape[1])
    assert 0.02 < share < 0.95
    assert case.startswith("crowded") or decided.double().mean() > 0.99
    if many > 1:  # entry by entry: the very decisions and values of float32
        assert torch.equal(features.dense(), in_float32(x, w, b, t))


def test_the_margin_has_no_room(generator, monkeypatch):
    """Where all that rounding takes from a token lies along the weights, and decides the sign."""
    screened(monkeypatch)
    w = torch.randn(4, 2_000, generator=generator).bfloat16()
    along = w.double().T / w.double().norm(dim=0)[:, None]
    x = torch.randn(2_000, 4, generator=generator).double()
    low = (x - (x * along).sum(1, keepdim=True) * along).bfloat16().double()
    lost = -(low * along).sum(1, keepdim=True) * along
    x = (low + (1 + 1e-4) * lost).float()  # token i is of feature i
    w, x = (v[..., (x.bfloat16() == low).all(1), :] for v in (w.T, x))
    w, t = w.T, torch.zeros(len(x))
    found = Encoder(w, t, JumpReLU(t)).encode(x).dense()
    assert torch.equal(found, in_float32(x, w, t, t))
    assert 0.2 < found.diagonal().count_nonzero() / len(x) < 0.8


@pytest.mark.parametrize("d_in", [1, 2, 27, 28, 29, 32, 64, 100, 1_000])
@pytest.mark.parametrize("d_sae", [1, 255, 256, 257, 700])
def test_the_screen_is_for_any_shape(d_in, d_sae, generator, monkeypatch):
    screened(monkeypatch)
    x, w, b, t = drawn(generator, 9, d_in, d_sae)
    checked(Encoder(w, b, JumpReLU(t)).encode(x), x, w, b, t)
    assert torch.equal(Encoder(w, b, ReLU()).encode(x).dense(), in_float32(x, w, b, t * 0))


@pytest.mark.parametrize("case", CASES)
def test_screened_and_plain_agree_but_for_rounding(case, generator, monkeypatch):
    x, w, b, t = CASES[case](*drawn(generator), generator)
    monkeypatch.setattr(module, "screens_pay", lambda device: False)
    plain = Encoder(w, b, JumpReLU(t)).encode(x)
    decided = checked(plain, x, w, b, t)
    screened(monkeypatch)
    through = Encoder(w, b, JumpReLU(t)).encode(x)
    assert torch.equal(fired(plain) & decided, fired(through) & decided)


def scaled(generator, shape, exponents):
    return torch.randn(shape, generator=generator) * 2.0 ** torch.tensor(exponents)


EXPONENTS = st.lists(st.integers(-40, 40), min_size=1, max_size=12)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    d_in=st.integers(1, 70),
    of_tokens=EXPONENTS,
    of_features=EXPONENTS,
    bias=st.one_of(st.none(), st.integers(-40, 40)),
    near=st.one_of(st.none(), st.sampled_from([0.0, 2.0**-23, 1e-6, 1e-4])),
    zero=st.floats(0, 1),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    rounded=st.booleans(),
)
def test_the_screen_misses_nothing_of_any_kind(
    seed, d_in, of_tokens, of_features, bias, near, zero, stored, rounded
):
    g = torch.Generator().manual_seed(seed)
    n, d_sae = len(of_tokens), len(of_features)
    x = scaled(g, (d_in, n), of_tokens).T.contiguous()
    x = x * (torch.rand(n, d_in, generator=g) >= zero)
    x = x.bfloat16().float() if rounded else x
    w = scaled(g, (d_in, d_sae), of_features).to(stored)
    b = torch.zeros(d_sae) if bias is None else scaled(g, (d_sae,), [bias])
    t = torch.zeros(d_sae)
    if near is not None:  # thresholds at a token's own pre-activation, or that far from it
        pre = exact(x, w, b)[0][torch.randint(n, (d_sae,), generator=g), torch.arange(d_sae)]
        t = (pre * (1 + near * torch.randn(d_sae, generator=g))).clamp_min(0).float()
    with pytest.MonkeyPatch.context() as patch:
        screened(patch, tile=5)
        features = Encoder(w, b, JumpReLU(t)).encode(x)
    checked(features, x, w, b, t)
    assert torch.equal(features.dense(), in_float32(x, w, b, t))


def whole_numbers(generator, n=37, d_in=24, d_sae=600):
    """An encoder whose float32 sums are exact in any order, and no two of whose features tie."""
    x = torch.randint(-8, 9, (n, d_in), generator=generator).float()
    w = torch.randint(-8, 9, (d_in, d_sae), generator=generator).float()
    return x, w, torch.arange(d_sae) / 1_024


@pytest.mark.parametrize("through_screen", [False, True])
@pytest.mark.parametrize("tile", [1, 7, 256, 600, 10_000])
def test_tiles_do_not_change_the_answer(tile, through_screen, generator, monkeypatch):
    x, w, b = whole_numbers(generator)
    screened(monkeypatch, tile=tile)
    monkeypatch.setattr(module, "screens_pay", lambda device: through_screen)
    pre = x.double() @ w.double() + b.double()
    t = torch.randint(0, 200, (600,), generator=generator).float()
    of_each = pre.topk(9, dim=1).values.min(1, keepdim=True).values
    of_all = pre.flatten().topk(9 * len(x)).values
    for activation, mask in (
        (JumpReLU(t), pre > t),
        (ReLU(), pre > 0),
        (TopK(9), pre >= of_each),
        (TopK(600), pre > 0),
        (TopK(9_999), pre > 0),
        (BatchTopK(600), pre > 0),
        (BatchTopK(9_999), pre > 0),
    ):
        found = Encoder(w, b, activation).encode(x)
        assert torch.equal(found.dense().double(), pre * mask), activation
        assert torch.equal(fired(found), mask & (pre > 0))
    found = Encoder(w, b, BatchTopK(9)).encode(x)  # equal sums of two tokens may tie
    assert torch.equal(found.values.double().sort(descending=True).values, of_all)
    assert torch.equal(found.dense().double()[fired(found)], pre[fired(found)])


@pytest.mark.parametrize("tile", [3, 64, 600])
def test_ties_are_broken_and_nothing_comes_twice(tile, generator, monkeypatch):
    screened(monkeypatch, tile=tile)
    x, w, _ = whole_numbers(generator)
    pre = x @ w
    some = Encoder(w, torch.zeros(600), TopK(50)).encode(x)
    assert torch.equal(some.dense()[fired(some)], pre[fired(some)])
    assert torch.equal(some.dense().topk(50).values, pre.topk(50).values)
    for activation, each, together in ((TopK(4), 4, 4 * 37), (BatchTopK(4), None, 4 * 37)):
        alike = Encoder(w * 0, torch.ones(600), activation).encode(x)
        assert int(fired(alike).sum()) == alike.indices.numel() == together
        assert each is None or (alike.counts == each).all()
        assert (alike.values == 1).all()


def test_of_equal_sums_only_positive_ones_are_kept(monkeypatch):
    screened(monkeypatch, tile=2)
    w, x = torch.tensor([[-1.0, 0.0, 1.0, -2.0, 2.0]]), torch.ones(2, 1)
    for activation in (ReLU(), JumpReLU(torch.zeros(5)), TopK(4), BatchTopK(4)):
        found = Encoder(w, torch.zeros(5), activation).encode(x)
        assert found.indices.tolist() == [2, 4, 2, 4]
        assert found.values.tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_no_numbers_are_refused(value, generator):
    x, w, b, t = drawn(generator)
    told = "activations hold NaN or infinity: the model has overflowed; load it in bfloat16"
    for place in ((0, 0), (-1, -1)):
        wrong = x.clone()
        wrong[place] = value
        for activation in (JumpReLU(t), ReLU(), TopK(3), BatchTopK(3)):
            with pytest.raises(InputError, match=told):
                Encoder(w, b, activation).encode(wrong)
    one = Layer(w_enc=w, b_enc=b, threshold=t, w_dec=torch.ones(600, 1, 3), b_dec=torch.ones(3))
    model = CrossLayer(layers=(one,), reads=Sites([HERE]), writes=Sites([HERE]))
    with pytest.raises(InputError, match=told):
        model.encode(wrong[:, None])


def test_screens_are_kept_for_any_number_of_tokens_and_within_bounds(generator, monkeypatch):
    screened(monkeypatch)
    monkeypatch.setattr(module, "_TILE_BYTES", 2**20)
    made, of = [], screening.Screen.of
    monkeypatch.setattr(module.Screen, "of", lambda *a, **k: made.append(1) or of(*a))
    x, w, b, t = drawn(generator, 400, 50, 1_500)
    encoder = Encoder(w, b, JumpReLU(t))
    for n in (400, 1, 73, 399, 400):
        checked(encoder.encode(x[:n]), x[:n], w, b, t)
    tiles = len(made)
    assert tiles == len(encoder._screens) > 1
    held = sum(s.weights.nbytes + s.low.nbytes for s in encoder._screens.values())
    monkeypatch.setattr(module, "_HELD_BYTES", held - 1)
    other = Encoder(w, b, JumpReLU(t))
    counts = [(checked(other.encode(x), x, w, b, t), len(made))[1] for _ in range(2)]
    assert counts[1] - counts[0] == counts[0] - tiles > 0
    assert not other._screens


def test_weights_changed_in_place_are_seen(generator, monkeypatch):
    screened(monkeypatch)
    x, w, b, t = drawn(generator)
    encoder = Encoder(w, b, JumpReLU(t))
    for change in (lambda: w[:, ::2].neg_(), lambda: b.add_(3), lambda: t.mul_(0.1)):
        before = encoder.encode(x).dense()
        change()
        after = encoder.encode(x)
        assert not torch.equal(after.dense(), before)
        checked(after, x, w, b, t)


def test_screens_made_while_inferring_are_of_use_later(generator, monkeypatch):
    screened(monkeypatch)
    with torch.inference_mode():
        x, w, b, t = drawn(generator)
        encoder = Encoder(w, b, JumpReLU(t))
        first = encoder.encode(x)
    assert torch.equal(encoder.encode(x).dense(), first.dense())


def test_gradients_flow_where_they_are_enabled_and_only_there(generator, monkeypatch):
    x, w, b, t = drawn(generator)
    screened(monkeypatch)
    for activation in (JumpReLU(t), ReLU(), TopK(5), BatchTopK(5)):
        for name in ("x", "w", "b"):
            given = {"x": x, "w": w, "b": b}
            given[name] = given[name].clone().requires_grad_()
            encoder = Encoder(given["w"], given["b"], activation)
            with torch.no_grad():
                still = encoder.encode(given["x"])
            assert not still.values.requires_grad
            found = encoder.encode(given["x"])
            assert torch.equal(found.indices, still.indices)
            mask = fired(found).float()
            (got,) = torch.autograd.grad(found.values.sum(), given[name])
            expected = {"x": mask @ w.T, "w": x.T @ mask, "b": mask.sum(0)}[name]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_whole_reconstruction(generator, monkeypatch):
    screened(monkeypatch)
    x, w, b, t = drawn(generator)
    w_dec = torch.randn(600, 50, generator=generator)
    sae, wanting = dictionary(w, b, t, w_dec), x.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(sae.reconstruct(wanting), sae.reconstruct(x))
    (got,) = torch.autograd.grad(sae.reconstruct(wanting).sum(), wanting)
    expected = (w_dec.sum(1) * fired(sae.encode(x))) @ w.T
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("through_screen", [False, True])
@pytest.mark.parametrize("offset", [1, 2, 1_001])
def test_weights_at_odd_places_of_a_file_are_the_same_weights(
    offset, through_screen, generator, monkeypatch, tmp_path
):
    """Arrays in an archive begin wherever the bytes before them end."""
    screened(monkeypatch)
    monkeypatch.setattr(module, "screens_pay", lambda device: through_screen)
    x, w, b, t = drawn(generator)
    w_dec = torch.randn(600, 50, generator=generator)

    def mapped(tensor, name):
        file = tmp_path / name
        file.write_bytes(b"x" * offset + tensor.numpy().tobytes())
        flat = np.memmap(file, "<f4", "c", offset, (tensor.numel(),))
        return torch.from_numpy(np.asarray(flat)).reshape(tensor.shape)

    tensors = {"w": w, "b": b, "t": t, "w_dec": w_dec}
    aligned = dictionary(**tensors)
    odd = dictionary(**{name: mapped(tensor, name) for name, tensor in tensors.items()})
    assert odd.w_enc.data_ptr() % 4 == offset % 4
    expected, got = aligned.encode(x), odd.encode(x)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(odd.decode(got), aligned.decode(expected))
    assert torch.equal(odd.only([5, 77]).encode(x).dense(), aligned.only([5, 77]).encode(x).dense())
    assert torch.equal(odd.pre_activations(x, [3, 9]), aligned.pre_activations(x, [3, 9]))
