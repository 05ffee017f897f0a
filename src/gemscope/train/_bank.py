"""The encoders of one site: artefacts side by side, one product for all of them.

The rows of all encoders lie in one matrix, of which each artefact's are a part. Artefacts that go
the dense way share a dense product, those that go the sparse way a screened one; both give float32
pre-activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import BatchTopK, Encoder, JumpReLU, SparseFeatures, TopK

_MOST = 2**26
"""Entries of a dense product shared by several artefacts: 256 MB."""


@dataclass(eq=False)
class Member:
    """The encoder of one layer of one artefact."""

    w_enc: Float[Tensor, "n_features d_in"]
    bias: Float[Tensor, " n_features"]
    """Of the product of the input as it is."""
    low: Float[Tensor, " n_features"] | None
    """Where the support begins; None: it is the largest entries."""
    dense: bool
    k: int = 0
    whole_batch: bool = False
    """Whether the largest are chosen from the batch, not for each token."""


Encoded = Float[Tensor, "batch n_features"] | SparseFeatures
"""All pre-activations, or those of the support."""


class Bank:
    """Encoders of one input, their rows moved into one matrix."""

    def __init__(self, encoders: Sequence[Float[Tensor, "n_features d_in"]]):
        self.rows = torch.cat(list(encoders))
        ends = torch.tensor([len(e) for e in encoders]).cumsum(0).tolist()
        self.views = [self.rows[end - len(e) : end] for e, end in zip(encoders, ends, strict=True)]
        """The same encoders, as parts of it."""


def encode(
    x: Float[Tensor, "batch d_in"], rows: Float[Tensor, "n_all d_in"], members: Sequence[Member]
) -> list[Encoded]:
    """What each of the members, which together make up `rows`, encodes of `x`."""
    out: list[Encoded] = []
    first = 0
    for way, run in groupby(_batched(members, len(x)), key=lambda m: m[0]):
        some = [member for _, member in run]
        count = sum(len(m.w_enc) for m in some)
        mine = rows[first : first + count]
        if way[0] == "dense":
            out += _dense(x, mine, some)
        elif way[0] == "sparse":
            out += _sparse(x, mine, some)
        else:
            out += [_largest(x, m) for m in some]
        first += count
    return out


def _batched(members: Sequence[Member], n_tokens: int) -> list[tuple[tuple[str, int], Member]]:
    """Members by the way they go; a dense run ends where its product would be too large."""
    out, turn, entries = [], 0, 0
    for m in members:
        way = "largest" if m.low is None else "dense" if m.dense else "sparse"
        entries += len(m.w_enc) * n_tokens
        if entries > _MOST:
            turn, entries = turn + 1, len(m.w_enc) * n_tokens
        out.append(((way, turn if way == "dense" else 0), m))
    return out


def _dense(x: Tensor, rows: Tensor, members: list[Member]) -> list[Encoded]:
    bias = members[0].bias if len(members) == 1 else torch.cat([m.bias for m in members])
    z = torch.addmm(bias, x, rows.T)
    return list(z.split([len(m.w_enc) for m in members], dim=1))


def _sparse(x: Tensor, rows: Tensor, members: list[Member]) -> list[Encoded]:
    bias = torch.cat([m.bias for m in members])
    low = torch.cat([m.low for m in members if m.low is not None])
    found = Encoder(rows.T, bias, JumpReLU(low), keep=False).encode(x)
    if len(members) == 1:
        return [found]
    ends = torch.tensor([len(m.w_enc) for m in members], device=x.device).cumsum(0)
    columns, tokens = found.indices.long(), found.rows
    out: list[Encoded] = []
    for m, end in zip(members, ends.tolist(), strict=True):
        width = len(m.w_enc)
        mine = ((columns >= end - width) & (columns < end)).nonzero().squeeze(1)
        out.append(
            SparseFeatures.from_entries(
                tokens[mine], columns[mine] - (end - width), found.values[mine], len(x), width
            )
        )
    return out


def _largest(x: Tensor, m: Member) -> SparseFeatures:
    largest = BatchTopK(m.k) if m.whole_batch else TopK(m.k)
    return Encoder(m.w_enc.T, m.bias, largest, keep=False).encode(x)
