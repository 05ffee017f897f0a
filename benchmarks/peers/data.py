"""Activations made up for timing, the same for everyone: sparse sums out of a fixed dictionary.

A row is the sum of 30 random unit vectors out of 4 x d_in, with exponential coefficients, and
noise of deviation 0.1 in each coordinate. Noise alone will not do: on it no feature is sparse.
"""

import torch
from torch import Tensor

VECTORS, ACTIVE, NOISE = 4, 30, 0.1


def activations(tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows in float32, `[tokens, d_in]`, their mean norm near 8 beside the noise's sqrt(d_in) / 10.

    The dictionary depends on `d_in` and `seed` alone: more tokens are more of the same.
    """
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(VECTORS * d_in, d_in, generator=g)
    vectors /= vectors.norm(dim=1, keepdim=True)
    chosen = torch.randint(len(vectors), (tokens, ACTIVE), generator=g)
    coefficients = torch.empty(tokens, ACTIVE).exponential_(generator=g)
    x = torch.nn.functional.embedding_bag(
        chosen, vectors, per_sample_weights=coefficients, mode="sum"
    )
    return x.add_(torch.randn(tokens, d_in, generator=g), alpha=NOISE)


def sample(x: Tensor) -> Tensor:
    """512 rows from all over `x`, or all: to set a threshold and to measure an L0."""
    return x[:: max(1, len(x) // 512)]


def level(pre: Tensor, l0: float) -> float:
    """The threshold over which each row of `pre` has `l0` entries on average."""
    count = max(1, round(len(pre) * l0))
    return pre.flatten().topk(count).values[-1].item()
