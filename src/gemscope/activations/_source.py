"""What training reads from: batches of activations, and places among them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gemscope.sites import Site


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a source; everything after it follows from it and the seed.

    A source serves its tokens round by round, one long row of them, and cuts the row into batches.
    `batch` counts the batches that end in `round`.
    """

    round: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """Activations of the same tokens at every site, and where the source goes on."""

    values: Mapping[Site, Float[Tensor, "n d"]]
    after: Position
    """Where the source goes on after this batch."""


@runtime_checkable
class Source(Protocol):
    """Shuffled activations of several sites, endless, the same at every run."""

    sites: tuple[Site, ...]
    tokens: int
    """Activations of one epoch, at each site; whole batches need not divide it."""
    batch: int
    """Tokens of a batch."""

    @property
    def model_seconds(self) -> float:
        """Time spent in the language model so far; 0 where none is run."""
        ...

    def sample(self, tokens: int) -> dict[Site, Float[Tensor, "n d"]]:
        """Up to `tokens` shuffled activations of the beginning, in float32.

        What scales, means and initial thresholds are measured on; fewer where an epoch has fewer.
        """
        ...

    def batches(
        self, start: Position = Position(), stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ActivationBatch]:
        """Batches from `start` on, over and over the same tokens in new orders.

        Without end, unless `stopping` says so: it is asked between two steps of making a batch.
        """
        ...
