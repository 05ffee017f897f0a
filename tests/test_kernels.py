"""Products with sparse codes, and finding entries, against plain dense ways."""

import pytest
import torch

from gemscope.sae import row_offsets, sampled_products, weighted_sums
from gemscope.sae._kernels import entries, positive


def code(generator, rows=13, columns=40, share=0.2):
    mask = torch.rand(rows, columns, generator=generator) < share
    mask[4] = False  # a row without entries
    mask[7] = True  # and one with all of them
    r, c = mask.nonzero(as_tuple=True)
    return row_offsets(r, rows), r, c


def test_weighted_sums_are_a_sparse_product(generator):
    offsets, r, c = code(generator)
    values = torch.randn(len(c), generator=generator)
    table = torch.randn(40, 7, generator=generator)
    dense = torch.zeros(13, 40, dtype=torch.float64)
    dense[r, c] = values.double()
    bound = 41 * 2.0**-24 * (dense.abs() @ table.abs().double())
    got = weighted_sums(offsets, c, values, table)
    assert got.dtype == torch.float32
    assert ((got.double() - dense @ table.double()).abs() <= bound).all()
    assert not got[4].any()


def test_sampled_products_are_entries_of_a_dense_one(generator):
    offsets, r, c = code(generator)
    a, b = torch.randn(13, 33, generator=generator), torch.randn(40, 33, generator=generator)
    exact = (a.double() @ b.double().T)[r, c]
    bound = 34 * 2.0**-24 * (a.abs().double() @ b.abs().double().T)[r, c]
    assert ((sampled_products(offsets, c, a, b).double() - exact).abs() <= bound).all()


def test_without_entries_there_are_none(generator):
    none, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    table = torch.randn(3, 4, generator=generator)
    assert torch.equal(weighted_sums(offsets, none, torch.zeros(0), table), torch.zeros(5, 4))
    assert sampled_products(offsets, none, torch.randn(5, 4), table).shape == (0,)


@pytest.mark.parametrize("columns", [1, 7, 8, 64, 100, 256])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_entries_are_those_of_nonzero(columns, share, generator):
    mask = torch.rand(29, columns, generator=generator) < share
    for some in (mask, mask[:, : max(1, columns - 3)]):
        for got, wanted in zip(entries(some), some.nonzero(as_tuple=True), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("columns", [1, 4, 6, 64, 130])
def test_positive_finds_all_that_are_in_order_and_nothing_negative(columns, generator):
    signs = torch.randn(31, columns, generator=generator).bfloat16()
    signs[torch.rand(signs.shape, generator=generator) < 0.1] = 0.0
    signs[torch.rand(signs.shape, generator=generator) < 0.1] = -0.0
    kept = signs.clone()
    rows, columns_ = positive(signs.clone())
    found = torch.zeros_like(kept, dtype=torch.bool)
    found[rows, columns_] = True
    assert found[kept > 0].all()
    assert not found[kept < 0].any()
    assert not found[(kept == 0) & kept.signbit()].any()
    flat = rows * kept.shape[1] + columns_
    assert (flat.diff() > 0).all()
