"""Activations of several sites in memory that is taken once, written and freed slot by slot."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.sites import Site


class Ring:
    """`capacity` slots; a slot holds one token's activations at every site."""

    def __init__(
        self, widths: Mapping[Site, int], capacity: int, dtype: torch.dtype, device: torch.device
    ):
        self.values = {
            site: torch.empty(capacity, width, dtype=dtype, device=device)
            for site, width in widths.items()
        }
        self._free, self._count = torch.arange(capacity), capacity

    def take(self, count: int) -> Int[Tensor, " n"]:
        """Slots to write to, which are free no longer."""
        assert count <= self._count, "blocks are cut so that they fit"
        self._count -= count
        return self._free[self._count : self._count + count].clone()

    def release(self, slots: Int[Tensor, " n"]) -> None:
        """Free `slots`; what they hold may be overwritten."""
        self._free[self._count : self._count + len(slots)] = slots
        self._count += len(slots)

    def put(self, slots: Int[Tensor, " n"], values: Mapping[Site, Float[Tensor, "n d"]]) -> None:
        """Write one token's activations to each slot, rounded to the ring's type."""
        for site, kept in self.values.items():
            kept.index_copy_(0, slots.to(kept.device), values[site].to(kept.dtype))

    def gather(self, slots: Int[Tensor, " n"]) -> dict[Site, Float[Tensor, "n d"]]:
        """A copy of what `slots` hold."""
        return {
            site: kept.index_select(0, slots.to(kept.device)) for site, kept in self.values.items()
        }
