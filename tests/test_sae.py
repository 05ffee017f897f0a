"""The dictionary as a function: against float64, by hand, and by laws."""

from dataclasses import replace

import pytest
import torch

from gemscope.errors import InputError
from gemscope.sae import SAE, BatchTopK, JumpReLU, ReLU, SparseFeatures, TopK
from gemscope.sae import _encode as module
from gemscope.sites import Site

HERE = Site.parse("0.resid_post")
D_IN, D_SAE, D_OUT = 24, 200, 16


def made(activation=None, *, dtype=torch.float32, skip=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    threshold = torch.rand(D_SAE, generator=g) * 2
    return SAE(
        w_enc=torch.randn(D_IN, D_SAE, generator=g).to(dtype),
        b_enc=torch.randn(D_SAE, generator=g).to(dtype),
        w_dec=torch.randn(D_SAE, D_OUT, generator=g).to(dtype),
        b_dec=torch.randn(D_OUT, generator=g).to(dtype),
        skip=torch.randn(D_IN, D_OUT, generator=g).to(dtype) if skip else None,
        activation=activation or JumpReLU(threshold),
        reads=HERE,
        writes=HERE,
    )


def inputs(n=50):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def double(sae, x):
    """Pre-activations in float64, and the bound on their float32 rounding."""
    pre = x.double() @ sae.w_enc.double() + sae.b_enc.double()
    # A dot product of length n in float32 errs by at most n units of rounding of its absolute sum.
    sums = x.double().abs() @ sae.w_enc.double().abs() + sae.b_enc.double().abs()
    return pre, (D_IN + 1) * 2**-24 * sums


def test_jumprelu_by_hand():
    pre = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    mask = JumpReLU(torch.tensor([1.0, 1.0, 5.0, 0.0])).mask(pre)
    assert mask.tolist() == [[False, True, False, False]]


def test_a_value_on_the_threshold_is_off_and_a_value_above_is_kept_whole():
    pre = torch.tensor([[0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()]])
    assert JumpReLU(torch.tensor([0.5, 0.5])).mask(pre).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_against_float64(dtype):
    sae, x = made(dtype=dtype), inputs()
    pre, bound = double(sae, x)
    got = sae.encode(x).dense().double()
    above = pre - sae.activation.threshold.double()
    decided = above.abs() > bound
    expected = torch.where(above > 0, pre, 0.0)
    assert decided.double().mean() > 0.999
    assert ((got - expected).abs() <= bound)[decided].all()
    assert sae.encode(x).values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_decode_against_float64(dtype, skip):
    sae, x = made(dtype=dtype, skip=skip), inputs()
    features = sae.encode(x)
    dense = features.dense().double()
    expected = dense @ sae.w_dec.double() + sae.b_dec.double()
    sums = dense.abs() @ sae.w_dec.double().abs() + sae.b_dec.double().abs()
    if skip:
        expected += x.double() @ sae.skip.double()
        sums += x.double().abs() @ sae.skip.double().abs()
    got = sae.decode(features, x)
    terms = int(features.counts.max()) + D_IN + 2
    assert got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= terms * 2**-24 * sums).all()


def test_tiles_do_not_change_the_answer(monkeypatch):
    for activation in (None, ReLU(), TopK(7), BatchTopK(7)):
        sae, x = made(activation), inputs(37)
        _, bound = double(sae, x)
        whole = sae.encode(x)
        monkeypatch.setattr(module, "_TILE_STEP", 16)
        monkeypatch.setattr(module, "_TILE_BYTES", 0)
        parts = sae.encode(x)
        monkeypatch.undo()
        assert torch.equal(whole.offsets, parts.offsets)
        assert torch.equal(whole.indices, parts.indices)
        # Two float32 answers, each within its rounding of the exact one.
        assert ((whole.values - parts.values).abs() <= 2 * bound.max()).all()


def test_top_k_keeps_the_k_largest_and_no_negative_one():
    sae, x = made(TopK(7)), inputs()
    pre, _ = double(sae, x)
    features = sae.encode(x)
    assert (features.counts <= 7).all()
    for row, pairs in zip(pre, features.top(7), strict=True):
        assert [i for i, _ in pairs] == row.topk(7).indices[row.topk(7).values > 0].tolist()
    negative = replace(sae, b_enc=sae.b_enc - 1e6)
    assert negative.encode(x).indices.numel() == 0


def test_batch_top_k_shares_its_budget_over_the_batch():
    sae, x = made(BatchTopK(7)), inputs()
    pre, _ = double(sae, x)
    features = sae.encode(x)
    assert features.indices.numel() == 7 * len(x)
    assert features.counts.unique().numel() > 1
    assert features.values.min() >= pre.flatten().topk(7 * len(x)).values.min() - 1e-4


def test_sparse_and_dense_say_the_same():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
    sparse = SparseFeatures.from_dense(dense)
    assert torch.equal(sparse.dense(), dense)
    assert sparse.top(1) == [[(1, 2.0)], [], [(0, 3.0)]]
    assert sparse.counts.tolist() == [1, 0, 2]
    assert torch.equal(sparse.tokens(1, 3).dense(), dense[1:])
    joined = SparseFeatures.join([sparse, sparse.tokens(2, 3)])
    assert torch.equal(joined.dense(), torch.cat((dense, dense[2:])))


def test_leading_axes_are_flattened_in_order_and_given_back():
    sae, x = made(), inputs(12)
    shaped = x.reshape(3, 4, D_IN)
    assert torch.equal(sae.encode(shaped).values, sae.encode(x).values)
    assert torch.equal(sae.reconstruct(shaped), sae.reconstruct(x).reshape(3, 4, D_OUT))


def test_no_token_and_no_feature_are_no_trouble():
    for activation in (None, ReLU(), TopK(7), BatchTopK(7)):
        features = made(activation).encode(inputs(0))
        assert (features.n_tokens, features.indices.numel()) == (0, 0)
        assert made(activation).reconstruct(inputs(0)).shape == (0, D_OUT)
    sae = made()
    silent = replace(sae, b_enc=sae.b_enc - 1e6)
    assert torch.equal(silent.reconstruct(inputs(2)), sae.b_dec.expand(2, -1))


def test_a_skip_connection_is_never_dropped():
    sae, x = made(skip=True), inputs()
    with pytest.raises(InputError, match=r"decode\(features, x\) needs x"):
        sae.decode(sae.encode(x))


def test_few_features_are_the_rows_and_columns_of_the_whole():
    for dtype in (torch.float32, torch.bfloat16):
        sae, x, chosen = made(dtype=dtype, skip=True), inputs(), [7, 199, 0, 7]
        some, dense = sae.only(chosen), sae.encode(x).dense()
        assert (some.d_sae, some.d_in, some.d_out) == (4, D_IN, D_OUT)
        pre, bound = double(sae, x)
        got = sae.pre_activations(x, chosen)
        assert got.dtype == torch.float32
        assert ((got.double() - pre[:, chosen]).abs() <= bound[:, chosen]).all()
        above = pre - sae.activation.threshold.double()
        decided = (above.abs() > bound)[:, chosen]
        off = (some.encode(x).dense() - dense[:, chosen]).abs().double()
        assert decided.double().mean() > 0.99
        assert (off <= 2 * bound[:, chosen])[decided].all()
        assert torch.equal(sae.rows(chosen), sae.w_dec[chosen].float()[:, None])
        # Skip and biases are the whole dictionary's.
        others = [i for i in range(D_SAE) if i not in chosen]
        kept = SparseFeatures.from_dense(dense.index_fill(1, torch.tensor(others), 0.0))
        once = sae.only([7, 199, 0])
        torch.testing.assert_close(once.reconstruct(x), sae.decode(kept, x))


def test_what_few_features_there_are_is_told():
    for wrong in ([], [200], [-1]):
        for ask in (made().only, made().rows, lambda f: made().pre_activations(inputs(), f)):
            with pytest.raises(InputError, match=r"this dictionary has features 0 to 199"):
                ask(wrong)
    with pytest.raises(InputError, match="taken out of JumpReLU dictionaries only"):
        made(TopK(7)).only([1])


def test_wrong_widths_are_told(unchecked):
    with pytest.raises(InputError, match="width 3 for a dictionary that reads 24"):
        made().encode(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"features of width 3 for a dictionary of 200"):
        made().decode(SparseFeatures.from_dense(torch.ones(2, 3)))
    with pytest.raises(InputError, match=r"b_enc is \[3\], not \[200\]"):
        replace(made(), b_enc=torch.zeros(3))
    with pytest.raises(InputError, match=r"threshold is \[4\], not \[200\]"):
        made(JumpReLU(torch.zeros(4)))
