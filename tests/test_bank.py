"""Encoders side by side, and what becomes of top-k."""

import pytest
import torch
from training import config, planted, trainer, weights

from gemscope.hub import load_sae
from gemscope.sae import SparseFeatures
from gemscope.train import train
from gemscope.train._bank import Bank, Member, encode

D = 5
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
