"""The largest pre-activations of each token, or of a batch, out of a few candidates.

Sorting all pre-activations takes several times as long as computing them. A sample of the features
says about where the smallest of the largest lies; what is above that floor is looked for as what is
above a threshold is. Tokens with fewer than `k` such entries are done in full, so that the sample
decides how long it takes and not what is found.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._screen import screens_pay
from ._sparse import SparseFeatures

_STRIDE = 8
"""One of so many features is in the sample."""
_TOKENS = 256
"""Tokens of the sample where the largest of a whole batch are looked for."""
_CAUTION = 3.5
"""Standard deviations of the number of the largest in a sample by which its floor is lower."""
WIDE = 4_096
"""Features from which on looking for candidates is faster than sorting everything."""


def floors(
    x: Float[Tensor, "n_tokens d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    whole_batch: bool,
) -> Float[Tensor, " n_tokens"] | None:
    """Floors that most tokens have `k` entries above, or that of a batch; None where the sample is
    too small to say.
    """
    if whole_batch:
        some = x[:: max(1, len(x) // _TOKENS)]
        z = _sample(some, w_enc, b_enc).reshape(1, -1)
        wanted = k * len(some) / _STRIDE
    else:
        z, wanted = _sample(x, w_enc, b_enc), k / _STRIDE
    rank = int(wanted + _CAUTION * wanted**0.5) + 1
    if 2 * rank > z.shape[1]:
        return None
    lowest = z.topk(rank, dim=1, sorted=False).values.amin(1).float().clamp_min_(0)
    return lowest.expand(len(x)) if whole_batch else lowest


def _sample(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    dtype = torch.bfloat16 if screens_pay(x.device) else torch.float32
    rows = w_enc.T[::_STRIDE].to(dtype)
    return torch.addmm(b_enc[::_STRIDE].to(dtype), x.to(dtype), rows.T)


def largest_of_each(found: SparseFeatures, k: int) -> SparseFeatures:
    """The `k` largest entries of each token, or all where there are fewer."""
    counts, rows = found.counts, found.rows
    place = torch.arange(len(rows), device=rows.device) - found.offsets[rows]
    table = found.values.new_full((found.n_tokens, max(int(counts.max()), k)), -torch.inf)
    table[rows, place] = found.values
    chosen = table.topk(k, dim=1, sorted=False).indices
    keep = torch.zeros_like(table, dtype=torch.bool).scatter_(1, chosen, True)[rows, place]
    return _kept(found, keep.nonzero().squeeze(1))


def largest_of_all(found: SparseFeatures, count: int) -> SparseFeatures:
    """The `count` largest entries of the batch."""
    return _kept(found, found.values.topk(count, sorted=False).indices.sort().values)


def _kept(found: SparseFeatures, places: Tensor) -> SparseFeatures:
    return SparseFeatures.from_entries(
        found.rows[places], found.indices[places].long(), found.values[places],
        found.n_tokens, found.d_sae,
    )  # fmt: skip


def with_tokens(
    code: SparseFeatures, tokens: Int[Tensor, " n_some"], others: SparseFeatures
) -> SparseFeatures:
    """`code` with what it has on `tokens` replaced by `others`."""
    kept = ~torch.isin(code.rows, tokens)
    rows, order = torch.cat((code.rows[kept], tokens[others.rows])).sort(stable=True)
    columns = torch.cat((code.indices[kept], others.indices)).long()[order]
    values = torch.cat((code.values[kept], others.values))[order]
    return SparseFeatures.from_entries(rows, columns, values, code.n_tokens, code.d_sae)
