"""The largest entries, found among candidates; encoders side by side; what becomes of top-k."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import config, planted, trainer, weights

from gemscope.hub import load_sae
from gemscope.sae import SparseFeatures
from gemscope.train import _topk, train
from gemscope.train._bank import Bank, Member, encode
from gemscope.train._topk import next_floor, top

TOKENS, D, WIDE = 7, 5, 48
EXACT = [-2.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0]
"""Values whose products and sums are exact: ties are ties however they are computed."""

matrices = st.integers(0, 2**32 - 1).map(lambda seed: drawn(seed, TOKENS, WIDE))


def drawn(seed, tokens, width):
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor(EXACT)[torch.randint(len(EXACT), (tokens, width), generator=g)]
    # Some tokens have next to no positive entry, some none.
    values[torch.rand(tokens, generator=g) < 0.3] -= 2.5
    return values


@pytest.fixture(autouse=True)
def _always_look_for_candidates(monkeypatch):
    monkeypatch.setattr(_topk, "_WIDE", 1)


def inputs(z):
    """Inputs, rows and bias whose pre-activations are `z`, exactly."""
    return torch.eye(len(z)), z.T.contiguous(), torch.zeros(z.shape[1])


def wanted(z, k, whole_batch):
    """Sorted values that must be chosen: of each token, or of the batch."""
    groups = z.reshape(1, -1) if whole_batch else z
    count = k * len(z) if whole_batch else k
    return [sorted((v for v in row if v > 0), reverse=True)[:count] for row in groups.tolist()]


def chosen(code, whole_batch):
    ends = [0, code.values.numel()] if whole_batch else code.offsets.tolist()
    return [sorted(code.values[a:b].tolist(), reverse=True) for a, b in pairwise(ends)]


@pytest.mark.parametrize("whole_batch", [False, True])
@settings(max_examples=150, deadline=None)
@given(
    z=matrices,
    k=st.integers(1, WIDE),
    floor=st.sampled_from([-1.0, 0.0, 1e-3, 0.25, 0.3, 0.75, 1.0, 2.9, 3.0, 1e6, float("inf")]),
)
def test_any_floor_finds_the_largest(whole_batch, z, k, floor):
    code = top(*inputs(z), k, whole_batch=whole_batch, floor=floor)
    assert chosen(code, whole_batch) == wanted(z, k, whole_batch)
    # Entries are what they are said to be, in the order of tokens and features, each once.
    assert torch.equal(z[code.rows, code.indices.long()], code.values)
    places = code.rows * WIDE + code.indices
    assert (places.diff() > 0).all()
    assert (code.n_tokens, code.d_sae) == z.shape


@pytest.mark.parametrize("whole_batch", [False, True])
def test_any_floor_finds_the_same_entries_of_a_product(whole_batch, generator):
    """Without ties, the features themselves are the same."""
    x, rows = torch.randn(64, 16, generator=generator), torch.randn(300, 16, generator=generator)
    bias = torch.randn(300, generator=generator)
    plain = top(x, rows, bias, 9, whole_batch=whole_batch, floor=0.0).dense()
    for floor in (0.1, 3.0, 6.0, 8.0, 12.0, 100.0):
        found = top(x, rows, bias, 9, whole_batch=whole_batch, floor=floor).dense()
        assert torch.equal(found > 0, plain > 0)
        # 17 roundings of numbers below 30.
        torch.testing.assert_close(found, plain, rtol=0, atol=17 * 30 * 2.0**-24)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_the_next_floor_is_below_what_nearly_every_token_chooses(whole_batch, generator):
    rows, bias = torch.randn(400, 24, generator=generator), torch.zeros(400)
    codes = [
        top(torch.randn(500, 24, generator=generator), rows, bias, 12, whole_batch=whole_batch,
            floor=0.0)
        for _ in range(2)
    ]  # fmt: skip
    floor = next_floor(codes[0], 12, whole_batch=whole_batch)
    assert floor > 0
    fresh = codes[1]
    smallest = torch.full((500,), torch.inf)
    smallest = smallest.scatter_reduce(0, fresh.rows, fresh.values, "amin")
    # The quantile 0.02 of the batch before, a tenth less.
    assert (smallest > floor).double().mean() > 0.97
    # And it leaves few candidates: it is no 0.
    z = torch.randn(500, 24, generator=generator) @ rows.T
    assert (z > floor).sum(1).double().mean() < 5 * 12


def test_there_is_no_floor_where_nothing_fires():
    none = torch.zeros(0, dtype=torch.int64)
    code = SparseFeatures.from_entries(none, none, torch.zeros(0), 4, 9)
    for whole_batch in (False, True):
        assert next_floor(code, 3, whole_batch=whole_batch) == 0.0


WIDTHS = (40, 7, 64, 33)


def members(ways, generator):
    encoders = [torch.randn(n, D, generator=generator) for n in WIDTHS]
    bank = Bank(encoders)
    out = []
    for way, rows, before in zip(ways, bank.views, encoders, strict=True):
        assert torch.equal(rows, before)
        low = None if way == "top" else torch.rand(len(rows), generator=generator)
        bias = torch.randn(len(rows), generator=generator) * 0.1
        out.append(Member(rows, bias, low, dense=way == "dense", k=3))
    return bank, out


@pytest.mark.parametrize(
    "ways",
    [
        ("dense",) * 4,
        ("sparse",) * 4,
        ("top",) * 4,
        ("dense", "sparse", "sparse", "dense"),
        ("sparse", "dense", "top", "sparse"),
        ("top", "sparse", "sparse", "top"),
    ],
    ids="-".join,
)
def test_members_of_a_bank_encode_as_if_alone(ways, generator):
    bank, some = members(ways, generator)
    x = torch.randn(50, D, generator=generator)
    for way, m, code in zip(ways, some, encode(x, bank.rows, some), strict=True):
        z = (x.double() @ m.w_enc.double().T + m.bias.double()).float()
        if way == "dense":
            got, expected = code, z
        elif way == "sparse":
            got, expected = code.dense(), z * (z > m.low)
            assert isinstance(code, SparseFeatures)
        else:
            got = code.dense()
            expected = torch.zeros_like(z).scatter(1, z.topk(3).indices, z.topk(3).values).relu()
        assert got.shape == (50, len(m.w_enc))
        # Six roundings of numbers below 20.
        torch.testing.assert_close(got, expected, rtol=0, atol=6 * 20 * 2.0**-24)


def test_dense_products_are_cut_where_they_would_be_too_large(monkeypatch, generator):
    bank, some = members(("dense",) * 4, generator)
    x = torch.randn(50, D, generator=generator)
    whole = encode(x, bank.rows, some)
    monkeypatch.setattr("gemscope.train._bank._MOST", 50 * 50)
    for a, b in zip(whole, encode(x, bank.rows, some), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=6 * 20 * 2.0**-24)


def test_views_of_a_bank_are_the_bank(generator):
    bank = Bank([torch.randn(n, D, generator=generator) for n in WIDTHS])
    bank.views[2].fill_(7.0)
    assert (bank.rows[47:111] == 7).all()
    assert not (bank.rows[:47] == 7).any()
    assert not (bank.rows[111:] == 7).any()


def test_batch_topk_is_used_with_a_threshold_that_fires_k(tmp_path):
    """Its JumpReLU threshold is a running mean of the smallest chosen value of a batch."""
    chosen = config(
        tmp_path / "run",
        {"name": "b", "reads": "1.resid_post", "d_sae": 96, "l0": 6, "activation": "batch-topk"},
        data__tokens=128 * 450, checkpoint_every=1_000,
    )  # fmt: skip
    run = trainer(chosen)
    run.train(tmp_path / "run")
    (learner,) = run.learners
    (part,) = learner.weights.folded(learner.scales)
    (site,) = chosen.sites
    fresh = planted(seed=0, tokens=8_192)[site]
    fires = fresh @ part.w_enc + part.b_enc > part.threshold
    # A mean of about 1 / 0.01 = 100 batches lags behind what is learned in them: within a tenth,
    # after some times as many.
    assert fires.double().sum(1).mean().item() == pytest.approx(6, rel=0.1)


def test_each_activation_is_exported_as_what_it_is(miniature, tmp_path):
    kinds = [
        {"name": a, "reads": "2.resid_post", "d_sae": 64, "l0": 5, "activation": a,
         "sparsity": {"penalty": "l1" if a == "relu" else "none"}}
        for a in ("topk", "batch-topk", "relu")
    ]  # fmt: skip
    folder = train(config(tmp_path / "run", *kinds, data__tokens=128 * 8), model=miniature)
    topk = load_sae(str(folder / "topk"))
    assert (type(topk.activation).__name__, topk.activation.k) == ("TopK", 5)
    batch = weights(folder / "batch-topk")["0.threshold"]
    assert batch.min() == batch.max() > 0
    relu = weights(folder / "relu")["0.threshold"]
    assert (relu == 0).all()
    for name in ("topk", "batch-topk", "relu"):
        sae = load_sae(str(folder / name))
        assert (str(sae.reads), sae.d_sae) == ("2.resid_post", 64)
