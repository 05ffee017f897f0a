"""The largest entries of each token, or of a batch, found among candidates."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.sae import BatchTopK, Encoder, TopK, _encode, _screen, _top

TOKENS, WIDE = 70, 48
"""More tokens than a screen is worth making for."""
EXACT = [-2.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0]
"""Values whose products and sums are exact: ties are ties however they are computed."""

matrices = st.integers(0, 2**32 - 1).map(lambda seed: drawn(seed, TOKENS, WIDE))
whole_or_each = pytest.mark.parametrize("whole_batch", [False, True])


def drawn(seed, tokens, width):
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor(EXACT)[torch.randint(len(EXACT), (tokens, width), generator=g)]
    # Some tokens have next to no positive entry, some none.
    values[torch.rand(tokens, generator=g) < 0.3] -= 2.5
    return values


@pytest.fixture(autouse=True, params=[False, True], ids=["float32", "screened"])
def _looks_for_candidates(request, monkeypatch):
    monkeypatch.setattr(_encode, "WIDE", 1)
    for module in (_encode, _top):
        monkeypatch.setattr(module, "screens_pay", lambda device: request.param)
    monkeypatch.setattr(_screen, "_MANY", 1.0)


def encoder(rows, bias, k, whole_batch):
    return Encoder(rows.T, bias, (BatchTopK if whole_batch else TopK)(k), keep=False)


def chosen(code, whole_batch):
    ends = [0, code.values.numel()] if whole_batch else code.offsets.tolist()
    return [sorted(code.values[a:b].tolist(), reverse=True) for a, b in pairwise(ends)]


def wanted(z, k, whole_batch):
    """Sorted values that must be chosen: of each token, or of the batch."""
    groups = z.reshape(1, -1) if whole_batch else z
    count = k * len(z) if whole_batch else k
    return [sorted((v for v in row if v > 0), reverse=True)[:count] for row in groups.tolist()]


@whole_or_each
@settings(max_examples=100, deadline=None)
@given(z=matrices, k=st.integers(1, WIDE), high=st.integers(0, 2**32 - 1))
def test_any_floors_find_the_largest(whole_batch, z, k, high):
    g = torch.Generator().manual_seed(high)
    levels = torch.tensor([0.0, 1e-3, 0.25, 0.3, 0.75, 1.0, 2.9, 3.0, 1e6, torch.inf])
    guessed = levels[torch.randint(len(levels), (1 if whole_batch else TOKENS,), generator=g)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_encode, "floors", lambda *a, **k: guessed.expand(TOKENS))
        # Inputs and rows whose pre-activations are `z`, exactly.
        some = encoder(z.T.contiguous(), torch.zeros(WIDE), k, whole_batch)
        code = some.encode(torch.eye(TOKENS))
    assert chosen(code, whole_batch) == wanted(z, k, whole_batch)
    # Entries are what they are said to be, in the order of tokens and features, each once.
    assert torch.equal(z[code.rows, code.indices.long()], code.values)
    places = code.rows * WIDE + code.indices
    assert (places.diff() > 0).all()
    assert (code.n_tokens, code.d_sae) == z.shape


@whole_or_each
@pytest.mark.parametrize("tile", [256, 4_096])
def test_guessed_floors_find_the_same_as_sorting(whole_batch, tile, generator, monkeypatch):
    """Of tokens of very different sizes; without ties, the features themselves are the same."""
    monkeypatch.setattr(_encode, "_TILE_BYTES", 4 * 200 * tile)
    x = torch.randn(200, 96, generator=generator) * torch.logspace(-3, 3, 200)[:, None]
    rows, bias = torch.randn(3_000, 96, generator=generator), torch.rand(3_000, generator=generator)
    some = encoder(rows, bias, 9, whole_batch)
    assert some._floors(x, 9, whole_batch=whole_batch) is not None
    z = x.double() @ rows.double().T + bias.double()
    flat = z.flatten()
    groups, k = (flat[None], 9 * len(x)) if whole_batch else (z, 9)
    least = groups.topk(k, dim=1).values[:, -1:]
    # Sums of 97 terms, each and each sum rounded.
    error = 98 * 2.0**-24 * (x.abs().double() @ rows.abs().double().T + bias)
    code = some.encode(x)
    on = torch.zeros_like(z, dtype=torch.bool)
    on[code.rows, code.indices.long()] = True
    assert not (on & (z < least - 2 * error)).any()
    assert not (~on & (z > least + 2 * error)).any()
    assert code.values.numel() == 9 * len(x)
    at = code.rows, code.indices.long()
    assert ((code.values - z[at]).abs() <= error[at]).all()


@whole_or_each
def test_floors_are_high_and_seldom_too_high(whole_batch, generator):
    x, rows = torch.randn(512, 64, generator=generator), torch.randn(8_192, 64, generator=generator)
    floor = _top.floors(x, rows.T, torch.zeros(8_192), 40, whole_batch=whole_batch)
    above = (x @ rows.T > floor[:, None]).sum(1).double()
    if whole_batch:
        assert 40 <= above.mean() <= 60
    else:
        # 3.5 standard deviations of a sample of about 5.
        assert (above < 40).double().mean() < 0.01
        assert 40 < above.mean() < 5 * 40


def test_samples_that_are_too_small_say_nothing(generator):
    x, rows = torch.randn(70, 8, generator=generator), torch.randn(64, 8, generator=generator)
    assert _top.floors(x, rows.T, torch.zeros(64), 30, whole_batch=False) is None
    assert _top.floors(x, rows.T, torch.zeros(64), 64, whole_batch=True) is None
