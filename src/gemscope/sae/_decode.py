"""Sums of decoder rows."""

import torch
from jaxtyping import Float
from torch import Tensor

from ._kernels import weighted_sums
from ._sparse import SparseFeatures


def decoded(
    features: SparseFeatures, rows: Float[Tensor, "n_rows d"]
) -> Float[Tensor, "n_tokens d"]:
    """For every token the sum of `value * rows[feature]`, in float32.

    Only the rows in use are read, and converted where they are stored in another type: a wide
    dictionary stays where and as it lies.
    """
    indices = features.indices.long()
    if rows.dtype != torch.float32 or not rows.is_contiguous():
        used, indices = indices.unique(return_inverse=True)
        rows = rows[used].float()
    return weighted_sums(features.offsets, indices, features.values, rows)
