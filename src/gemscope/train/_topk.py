"""The largest pre-activations of each token, or of a batch, found among a few candidates.

All entries above a floor are looked at first, through a screen where that is faster. Whichever
tokens have fewer than `k` of them are done in full, so the floor decides how long it takes and not
what is found.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import Encoder, JumpReLU, SparseFeatures

_WIDE = 4_096
"""Features from which on looking for candidates is faster than sorting everything."""


def top(
    x: Float[Tensor, "batch d_in"],
    w_enc: Float[Tensor, "n_features d_in"],
    bias: Float[Tensor, " n_features"],
    k: int,
    *,
    whole_batch: bool,
    floor: float,
) -> SparseFeatures:
    """The `k` largest positive entries of each token, or the `k * batch` largest of the batch."""
    width = len(w_enc)
    if floor <= 0 or width < _WIDE:
        return _of_all(torch.addmm(bias, x, w_enc.T), k, whole_batch=whole_batch)
    low = JumpReLU(torch.full_like(bias, floor))
    found = Encoder(w_enc.T, bias, low, keep=False).encode(x)
    if whole_batch:
        if found.values.numel() < k * len(x):
            return _of_all(torch.addmm(bias, x, w_enc.T), k, whole_batch=True)
        keep = found.values.topk(k * len(x), sorted=False).indices.sort().values
        return SparseFeatures.from_entries(
            found.rows[keep], found.indices[keep].long(), found.values[keep], len(x), width
        )
    rows, columns, values = _top_of_each(found, k)
    if len(short := (found.counts < k).nonzero().squeeze(1)):
        full = _of_all(torch.addmm(bias, x[short], w_enc.T), k, whole_batch=False)
        kept = ~torch.isin(rows, short)
        rows = torch.cat((rows[kept], short[full.rows]))
        rows, order = rows.sort(stable=True)
        columns = torch.cat((columns[kept], full.indices.long()))[order]
        values = torch.cat((values[kept], full.values))[order]
    return SparseFeatures.from_entries(rows, columns, values, len(x), width)


def _top_of_each(found: SparseFeatures, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` largest entries of each token, in the order of tokens and features."""
    rows, counts = found.rows, found.counts
    place = torch.arange(len(rows), device=rows.device) - found.offsets[rows]
    table = found.values.new_full((found.n_tokens, max(int(counts.max()), k)), -torch.inf)
    table[rows, place] = found.values
    chosen = table.topk(k, dim=1, sorted=False)
    keep = torch.zeros_like(table, dtype=torch.bool).scatter_(1, chosen.indices, True)[rows, place]
    return rows[keep], found.indices[keep].long(), found.values[keep]


def _of_all(z: Float[Tensor, "batch n_features"], k: int, *, whole_batch: bool) -> SparseFeatures:
    if whole_batch:
        flat = z.reshape(-1)
        best = flat.topk(min(k * len(z), flat.numel()), sorted=False)
        keep = best.indices[best.values > 0].sort().values
        rows, columns = keep // z.shape[1], keep % z.shape[1]
    else:
        best = z.topk(k, dim=1, sorted=False)
        columns, order = best.indices.sort(dim=1)
        rows, which = (best.values.gather(1, order) > 0).nonzero(as_tuple=True)
        columns = columns[rows, which]
    return SparseFeatures.from_entries(rows, columns, z[rows, columns], *z.shape)


def next_floor(code: SparseFeatures, k: int, *, whole_batch: bool) -> float:
    """A floor for the next batch: below the smallest chosen entry of nearly every token."""
    if code.values.numel() == 0:
        return 0.0
    if whole_batch:
        return 0.9 * float(code.values.min())
    full = code.counts == k
    if not bool(full.any()):
        return 0.0
    smallest = code.values.new_full((code.n_tokens,), torch.inf)
    smallest = smallest.scatter_reduce(0, code.rows, code.values, "amin")[full]
    return 0.9 * float(smallest.quantile(0.02))
