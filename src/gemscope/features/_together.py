"""Which features fire together, of all pairs of a dictionary, on the whole text."""

from collections.abc import Iterator

import numpy as np

from ._activations import Activations

_BYTES = 2**29
"""Of the table of counts that is held at a time."""


def pair_counts(
    activations: Activations, address: str, other: str | None = None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """`(first, stop, counts)`: tokens on which each of the features `first` to `stop` of one
    dictionary fires together with each feature of it, or of an `other` one; int32
    `[stop - first, d_sae]`.
    """
    n, m = activations.d_sae(address), activations.d_sae(other or address)
    step = max(1, min(n, _BYTES // (4 * m)))
    for first in range(0, n, step):
        stop = min(n, first + step)
        counts = np.zeros((stop - first, m), dtype=np.int32)
        pairs = zip(
            activations.codes(address), activations.codes(other or address), strict=True
        )  # fmt: skip
        for (_, _, code), (_, _, beside) in pairs:
            mine, theirs = (_ones(c) for c in (code[:, first:stop], beside))
            counts += (mine.T @ theirs).toarray()
        yield first, stop, counts


def _ones(code):
    from scipy.sparse import csc_array  # type: ignore[import-untyped]

    ones = np.ones(len(code.data), dtype=np.int32)
    return csc_array((ones, code.indices, code.indptr), shape=code.shape)


def together(
    counts: np.ndarray, own: np.ndarray, all_counts: np.ndarray, first: int, tokens: int, keep: int
) -> list[list[dict]]:
    """Of some features those that fire with them, the highest phi first.

    `counts [n, d_sae]` are tokens in common, `own [n]` and `all_counts [d_sae]` tokens of each.
    """
    both = counts.astype(np.float64)
    a, b = own[:, None].astype(np.float64), all_counts[None].astype(np.float64)
    spread = np.sqrt(a * (tokens - a) * b * (tokens - b))
    with np.errstate(divide="ignore", invalid="ignore"):
        phi = np.where(spread > 0, (both * tokens - a * b) / spread, 0.0)
    phi[np.arange(len(own)), first + np.arange(len(own))] = -np.inf
    phi[counts == 0] = -np.inf
    size = min(keep, phi.shape[1])
    best = np.argpartition(-phi, size - 1, axis=1)[:, :size]
    out: list[list[dict]] = []
    for row, places in enumerate(best):
        order = sorted((int(p) for p in places), key=lambda p: (-phi[row, p], p))
        out.append(
            [
                {
                    "feature": p, "count": int(counts[row, p]), "phi": float(phi[row, p]),
                    "jaccard": float(both[row, p] / (a[row, 0] + b[0, p] - both[row, p])),
                    "lift": float(both[row, p] * tokens / (a[row, 0] * b[0, p])),
                }
                for p in order
                if np.isfinite(phi[row, p])
            ]
        )  # fmt: skip
    return out
