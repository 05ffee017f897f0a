"""What the second pass sums up for one dictionary, and for its random counterpart."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.lm import Edits, splice
from gemscope.sae import CrossLayer, Dictionary, SparseFeatures
from gemscope.sites import Site, Sites, each

from ._baseline import random_dictionary
from ._metrics import LAYER_SUMS, SUMS, formulas, layer_formulas
from ._statistics import FeatureStatistics, PositionProfile, density_histogram
from ._sums import DocumentSums

_CONTEXTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything measured of one dictionary."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    """95% intervals over documents of the metrics that are ratios of sums."""
    baseline: dict[str, float]
    """The same metrics for a random dictionary of the same shape and L0; empty where that would
    take too much memory."""
    layers: list[dict[str, str | float]]
    """Of a multi-layer model, the metrics of each layer; empty otherwise."""
    tokens: int
    documents: int
    density: dict[str, list]
    positions: list[dict[str, int | float]]
    statistics: FeatureStatistics = field(repr=False)
    batches: list[TokenBatch] = field(repr=False)


class Pass:
    """Sums of one dictionary. What a multi-layer model writes is one long vector to them, and
    that of each layer once more by itself.
    """

    def __init__(
        self,
        sae: Dictionary,
        means: Mapping[Site, Tensor],
        samples: Mapping[Site, Tensor],
        *,
        seed: int,
        context: int,
        at: tuple[Site, ...],
    ):
        self.sae, self.at = sae, at
        self.mean = stacked(means, sae.writes).reshape(-1)
        self.random = random_dictionary(
            sae,
            stacked(samples, sae.reads),
            stacked(means, sae.reads),
            stacked(means, sae.writes),
            seed=seed,
        )
        self.sums, self.random_sums = DocumentSums(SUMS), DocumentSums(SUMS)
        many = each(sae.writes) if isinstance(sae, CrossLayer) else ()
        self.layers = {site: DocumentSums(LAYER_SUMS) for site in many}
        self.statistics = FeatureStatistics(sae.d_sae, keep=_CONTEXTS)
        self.positions = PositionProfile(context)

    @property
    def dictionaries(self) -> list[tuple[Dictionary, DocumentSums]]:
        """The dictionary and its random counterpart, if there is one, each with its sums."""
        own: list[tuple[Dictionary, DocumentSums]] = [(self.sae, self.sums)]
        return own if self.random is None else [*own, (self.random, self.random_sums)]

    def edit(self, sae: Dictionary) -> Edits:
        """The splice that the main figures are of."""
        return splice(sae, self.at)

    def add_reconstruction(
        self,
        x: Float[Tensor, "n_tokens ..."],
        y: Float[Tensor, "n_tokens ..."],
        documents: Int[Tensor, " n_tokens"],
        positions: Int[Tensor, " n_tokens"],
        places: Int[Tensor, " n_tokens"],
    ) -> None:
        """Add counted tokens: what is read, what is to be written, and where they stand."""
        target = y.double().flatten(1)
        around = (target - self.mean).square()
        offset = (self.mean - self.mean.mean()).square().sum()
        for sae, sums in self.dictionaries:
            features = sae.encode(x)
            out = sae.decode(features, x).double().flatten(1)
            squares = (out - target).square()
            error = squares.sum(1)
            norms, target_norms = out.norm(dim=1), target.norm(dim=1)
            dot = (out * target).sum(1)
            sums.add(
                documents,
                n=torch.ones_like(error),
                l0=features.counts,
                error=error,
                variance=around.sum(1),
                # About one scalar mean: the distance from the mean vector, and that vector's own
                # spread, which adds up exactly because deviations from the mean sum to zero.
                global_variance=around.sum(1) + offset,
                cosine=dot / (norms * target_norms).clamp_min(1e-30),
                norm_ratio=norms / target_norms.clamp_min(1e-30),
                written_square=norms.square(),
                written_dot=dot,
            )
            if sae is self.sae:
                self.statistics.add(features, documents, places)
                self.positions.add(positions.cpu(), error.cpu())
                self._add_layers(features, squares, around, documents)

    def _add_layers(
        self, features: SparseFeatures, squares: Tensor, around: Tensor, documents: Tensor
    ) -> None:
        if not isinstance(self.sae, CrossLayer):
            return
        shape = (len(squares), len(self.layers), -1)
        error, variance = squares.reshape(shape).sum(2), around.reshape(shape).sum(2)
        parts = self.sae.split(features)
        for place, sums in enumerate(self.layers.values()):
            sums.add(
                documents,
                n=torch.ones_like(error[:, place]),
                l0=parts[place].counts,
                error=error[:, place],
                variance=variance[:, place],
            )

    def result(self, uniform: float, seed: int, batches: list[TokenBatch]) -> Evaluation:
        """The figures of everything that was added."""
        figures = formulas(len(self.mean))
        density = self.statistics.density
        metrics = _figures(self.sums, figures) | {
            "dead_fraction": float((density == 0).mean()),
            "dense_fraction": float((density > 0.1).mean()),
            "importance_uniformity": uniform,
        }
        variance = self.sums.ratio("variance", "n")
        of_layer = layer_formulas(self.sae.d_out)
        return Evaluation(
            metrics=metrics,
            intervals=self.sums.intervals(figures, seed=seed),
            baseline={} if self.random is None else _figures(self.random_sums, figures),
            layers=[
                {"site": str(site), **_figures(sums, of_layer)}
                for site, sums in self.layers.items()
            ],
            tokens=self.statistics.tokens,
            documents=len(self.sums.table[self.sums.table.any(1)]),
            density=density_histogram(density),
            positions=self.positions.record(variance),
            statistics=self.statistics,
            batches=batches,
        )


def stacked(values: Mapping[Site, Tensor], sites: Site | Sites) -> Tensor:
    """`values` at `sites`: `[..., d]` of one site, `[..., n_sites, d]` of several."""
    if isinstance(sites, Site):
        return values[sites]
    return torch.stack([values[site] for site in sites], dim=-2)


def _figures(sums: DocumentSums, figures) -> dict[str, float]:
    totals = {name: np.asarray(sums.total(name)) for name in sums.names}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(formula(totals)) for name, formula in figures.items()}
