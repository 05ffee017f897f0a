"""Sums of decoder rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ._sparse import SparseFeatures


def weighted_sums(
    features: SparseFeatures, rows: Float[Tensor, "n_rows d"]
) -> Float[Tensor, "n_tokens d"]:
    """For every token the sum of `value * rows[feature]`, in float32.

    Only the rows in use are read, and converted where they are stored in another type: a wide
    dictionary stays where and as it lies.
    """
    indices = features.indices.long()
    if indices.numel() == 0:
        return torch.zeros(features.n_tokens, rows.shape[1], device=rows.device)
    if rows.dtype != torch.float32 or not rows.is_contiguous():
        used, indices = indices.unique(return_inverse=True)
        rows = rows[used].float()
    return F.embedding_bag(
        indices,
        rows,
        features.offsets,
        mode="sum",
        per_sample_weights=features.values,
        include_last_offset=True,
    )
