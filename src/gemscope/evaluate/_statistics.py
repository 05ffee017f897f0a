"""What a pass over the text leaves behind of each feature, in memory bounded by the dictionary."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.sae import SparseFeatures


class FeatureStatistics:
    """Exact counts, sums and maxima of every feature, and its top contexts.

    Of each feature the `keep` documents are kept in which it fires most strongly, each with the
    token of its peak: one per document, so a phrase repeated in a document cannot fill the list.
    """

    def __init__(self, d_sae: int, *, keep: int):
        self.d_sae, self.keep = d_sae, keep
        self.tokens = 0
        self.fired = np.zeros(d_sae, dtype=np.int64)
        self.sums = np.zeros(d_sae)
        self.peaks = np.zeros(d_sae, dtype=np.float32)
        # Entries of the top contexts, sorted by feature and falling value.
        self.feature = np.zeros(0, dtype=np.int64)
        self.value = np.zeros(0, dtype=np.float32)
        self.document = np.zeros(0, dtype=np.int64)
        self.place = np.zeros(0, dtype=np.int64)

    def add(
        self,
        features: SparseFeatures,
        documents: Int[Tensor, " n_tokens"],
        places: Int[Tensor, " n_tokens"],
    ) -> None:
        """Add counted tokens, each with its document and a number that identifies the token."""
        index = features.indices.cpu().numpy().astype(np.int64)
        value = features.values.cpu().numpy()
        rows = features.rows.cpu().numpy()
        self.tokens += features.n_tokens
        self.fired += np.bincount(index, minlength=self.d_sae)
        self.sums += np.bincount(index, weights=value.astype(np.float64), minlength=self.d_sae)
        np.maximum.at(self.peaks, index, value)
        self._merge(index, value, documents.cpu().numpy()[rows], places.cpu().numpy()[rows])

    def _merge(self, feature, value, document, place) -> None:
        feature = np.concatenate([self.feature, feature])
        value = np.concatenate([self.value, value])
        document = np.concatenate([self.document, document])
        place = np.concatenate([self.place, place])
        # The peak of each feature in each document; of equal peaks the earliest token.
        order = np.lexsort((place, -value, document, feature))
        feature, value, document, place = (a[order] for a in (feature, value, document, place))
        best = np.ones(len(feature), dtype=bool)
        best[1:] = (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])
        feature, value, document, place = (a[best] for a in (feature, value, document, place))
        # The strongest documents of each feature.
        order = np.lexsort((document, -value, feature))
        feature, value, document, place = (a[order] for a in (feature, value, document, place))
        rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
        kept = rank < self.keep
        self.feature, self.value = feature[kept], value[kept]
        self.document, self.place = document[kept], place[kept]

    @property
    def density(self) -> np.ndarray:
        """Share of counted tokens on which each feature fires `[d_sae]`."""
        return self.fired / max(self.tokens, 1)

    @property
    def mean(self) -> np.ndarray:
        """Mean activation over counted tokens, silent ones included `[d_sae]`."""
        return self.sums / max(self.tokens, 1)

    def contexts(self, feature: int) -> list[tuple[int, float]]:
        """The top tokens of `feature` as `(place, value)`, strongest first."""
        first, last = np.searchsorted(self.feature, [feature, feature + 1])
        return [(int(self.place[i]), float(self.value[i])) for i in range(first, last)]


def density_histogram(density: np.ndarray) -> dict[str, list[float] | list[int]]:
    """Features by the decimal logarithm of their density, in quarter decades, without dead ones."""
    edges = np.linspace(-7, 0, 29)
    logs = np.log10(density[density > 0])
    counts, _ = np.histogram(np.clip(logs, edges[0], 0), edges)
    return {"log10_edges": edges.tolist(), "features": counts.tolist()}


class PositionProfile:
    """Error and variance by position in the context, in bins that double."""

    def __init__(self, context: int):
        edges = [1]
        while edges[-1] < context:
            edges.append(edges[-1] * 2)
        self.edges = torch.tensor(edges)
        self.error = torch.zeros(len(edges), dtype=torch.float64)
        self.count = torch.zeros(len(edges), dtype=torch.int64)

    def add(self, positions: Int[Tensor, " n"], error: Float[Tensor, " n"]) -> None:
        """Add counted tokens: position in the context (BOS is 0) and squared error."""
        bins = torch.bucketize(positions, self.edges, right=True) - 1
        self.error.index_add_(0, bins, error.double())
        self.count += torch.bincount(bins, minlength=len(self.count))

    def record(self, variance: float) -> list[dict[str, int | float]]:
        """Per bin: first position, tokens, and squared error as a share of the overall variance."""
        return [
            {"from": int(e), "tokens": int(n), "fvu": float(s) / int(n) / variance}
            for e, s, n in zip(self.edges, self.error, self.count, strict=True)
            if n
        ]
