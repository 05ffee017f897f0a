"""Likeness of features: directions, what one writes of what another reads, firing together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ._pairs import Indexed, pairs, unit

_CELLS = 2**24


@dataclass(frozen=True, slots=True)
class Nearest:
    """Of each feature the features most like it, best first."""

    index: Int[np.ndarray, "n k"]
    value: Float[np.ndarray, "n k"]


def decoder_nearest(
    one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"] | None = None, *, k: int = 10
) -> Nearest:
    """Cosines of decoder rows: of `one` to those of `other`, or to the others of `one`.

    Across layers this means something where both write the residual stream.
    """
    left = unit(one)
    right = left if other is None else unit(other)
    return _nearest(len(left), len(right), lambda a, b: left[a:b] @ right.T, k=k, own=other is None)


def virtual_weights(
    decoder: Float[np.ndarray, "n d"], encoder: Float[np.ndarray, "m d"], *, k: int = 10
) -> Nearest:
    """Of each feature, the later features whose encoders its decoder row feeds most.

    `W_dec[i] . W_enc[:, j]`: how much one unit of feature `i` adds to the pre-activation of `j` by
    the direct path through the residual stream, by absolute size. Norms between them, attention
    and MLPs are ignored, so signs and orders mean more than sizes. `encoder` holds columns of
    `w_enc` as rows (`gemscope.features.encoder_vectors`).
    """
    return _nearest(
        len(decoder), len(encoder), lambda a, b: decoder[a:b] @ encoder.T, k=k, size=np.abs
    )


def firing_nearest(one: Indexed, other: Indexed | None = None, *, k: int = 10) -> Nearest:
    """Of each feature, those whose firing is most correlated with its own (phi), on one text."""
    index, value = [], []
    for block in pairs(one, other):
        phi = block.phi
        if other is None:
            phi[np.arange(len(phi)), np.arange(block.first, block.stop)] = -np.inf
        found = _best(phi, phi, k - (other is None and k >= phi.shape[1]))
        index.append(found[0])
        value.append(found[1])
    return Nearest(np.concatenate(index), np.concatenate(value))


def _nearest(
    n: int,
    m: int,
    product: Callable[[int, int], np.ndarray],
    *,
    k: int,
    own: bool = False,
    size: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Nearest:
    step, index, value = max(1, _CELLS // max(m, 1)), [], []
    for first in range(0, n, step):
        stop = min(n, first + step)
        found = product(first, stop)
        key = size(found)
        if own:
            key = key.copy()
            key[np.arange(stop - first), np.arange(first, stop)] = -np.inf
        best = _best(key, found, min(k, m - own))
        index.append(best[0])
        value.append(best[1])
    return Nearest(np.concatenate(index), np.concatenate(value))


def _best(key: np.ndarray, value: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest of each row by `key`; of equals the first."""
    k = min(k, key.shape[1])
    if k < key.shape[1]:
        chosen = np.sort(np.argpartition(-key, k - 1, axis=1)[:, :k], axis=1)
    else:
        chosen = np.broadcast_to(np.arange(k), (len(key), k)).copy()
    order = np.argsort(-np.take_along_axis(key, chosen, 1), axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, order, 1)
    return chosen, np.take_along_axis(value, chosen, 1)
