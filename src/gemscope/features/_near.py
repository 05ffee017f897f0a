"""Near misses: contexts in which a feature is silent, and came closest to firing."""

from collections.abc import Mapping

import numpy as np

KEPT = 6
"""Of each feature, of each shard."""


def nearest_misses(
    fires: Mapping[str, np.ndarray], wide: Mapping[str, np.ndarray] | None, context: np.ndarray
) -> dict[str, np.ndarray]:
    """The strongest near misses of each feature, one of a context, by place.

    `fires` and `wide` hold compressed columns (`offsets`, `places`, `values`), `wide` what comes
    near as well as what fires; `context` is the context of each place.
    """
    n_features = len(fires["offsets"]) - 1
    if wide is None:
        empty = np.zeros(n_features + 1, dtype=np.int64)
        return {
            "offsets": empty,
            "places": np.zeros(0, np.int32),
            "values": np.zeros(0, np.float32),
        }
    n_contexts = int(context[-1] - context[0]) + 1 if len(context) else 1
    loud = np.zeros(n_features * n_contexts, dtype=bool)
    loud[_keys(fires, context, n_contexts)] = True
    keys = _keys(wide, context, n_contexts)
    quiet = np.flatnonzero(~loud[keys])
    keys, places, values = keys[quiet], wide["places"][quiet], wide["values"][quiet]
    # The strongest of each feature and context, then the strongest contexts of each feature.
    order = np.lexsort((places, -values, keys))
    keys, places, values = keys[order], places[order], values[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    feature, places, values = keys[first] // n_contexts, places[first], values[first]
    order = np.lexsort((places, -values, feature))
    feature, places, values = feature[order], places[order], values[order]
    kept = np.arange(len(feature)) - np.searchsorted(feature, feature) < KEPT
    feature, places, values = feature[kept], places[kept], values[kept]
    order = np.lexsort((places, feature))
    counts = np.bincount(feature, minlength=n_features)
    return {
        "offsets": np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        "places": places[order].astype(np.int32),
        "values": values[order],
    }


def _keys(columns: Mapping[str, np.ndarray], context: np.ndarray, n_contexts: int) -> np.ndarray:
    """A number for the feature and the context of each entry."""
    features = np.repeat(np.arange(len(columns["offsets"]) - 1), np.diff(columns["offsets"]))
    return features * n_contexts + (context[columns["places"]] - context[0])
