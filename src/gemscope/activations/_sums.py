"""Statistics of a site's activations, summed in float64 as they are harvested."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError

from ._manifest import Statistics

_SLICE = 2**22
"""Bytes of float64 made at a time."""


class Sums:
    """Sums over the tokens of each site: norms, squared norms, vectors."""

    def __init__(self, widths: Mapping[str, int]):
        self.count = 0
        self.sums = {site: torch.zeros(2 + d, dtype=torch.float64) for site, d in widths.items()}
        """Of each site: the norms', the squared norms', then the vectors' sums."""

    def add(self, site: str, values: Float[Tensor, "n d"]) -> None:
        """Add the activations of some tokens at one site."""
        for some in values.split(max(1, _SLICE // (8 * values.shape[1]))):
            x = some.double()
            squares = x.square().sum(1)
            made = torch.cat([squares.sqrt().sum()[None], squares.sum()[None], x.sum(0)])
            self.sums[site] += made.cpu()

    def check(self) -> None:
        """Refuse activations that are not finite."""
        for site, sums in self.sums.items():
            if not sums.isfinite().all():
                raise InputError(
                    f"the model's activations at {site} are not finite; run it in another type, "
                    "such as --model-dtype float32"
                )

    def statistics(self) -> dict[str, Statistics]:
        """The means of norms and squared norms."""
        return {
            site: Statistics(
                count=self.count,
                mean_norm=float(sums[0]) / self.count,
                mean_square=float(sums[1]) / self.count,
            )
            for site, sums in self.sums.items()
        }

    def means(self) -> dict[str, Tensor]:
        """The mean vectors, in float64."""
        return {site: sums[2:] / self.count for site, sums in self.sums.items()}
