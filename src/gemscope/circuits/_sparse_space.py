"""The nodes that a circuit over SAEs may have, numbered through.

A node is a feature of a dictionary, or the dictionary's error at its site; at a position, or at
all positions together. Its key is a number: sites in the order of the pass, in each its positions,
at each the features and, last, the error.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gemscope.sites import Site


@dataclass(frozen=True, slots=True)
class SparseNode:
    """A feature, or with `feature` None an error; at a position, or with None at all of them."""

    dictionary: str
    site: Site
    feature: int | None
    position: int | None

    @property
    def name(self) -> str:
        """`ADDRESS/INDEX` or `ADDRESS/error`."""
        return f"{self.dictionary}/{'error' if self.feature is None else self.feature}"

    @property
    def id(self) -> str:
        """The same with its position, if it has one: unique in a circuit."""
        return self.name if self.position is None else f"{self.name}@{self.position}"

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "id": self.id, "kind": "error" if self.feature is None else "feature",
            "dictionary": self.dictionary, "site": str(self.site), "feature": self.feature,
            "position": self.position,
        }  # fmt: skip


@dataclass(frozen=True)
class Space:
    """All nodes there may be, as numbers."""

    names: tuple[str, ...]
    """Addresses of the dictionaries, in the order a pass computes their sites."""
    sites: tuple[Site, ...]
    widths: tuple[int, ...]
    """Features of each."""
    length: int | None
    """Positions of a prompt; None where a node is at all of them."""

    @cached_property
    def firsts(self) -> list[int]:
        """Key of the first node of each site, and last the number of all keys."""
        out = [0]
        for width in self.widths:
            out.append(out[-1] + (self.length or 1) * (width + 1))
        return out

    def keys(
        self, site: int, positions: Int[Tensor, " n"], features: Int[Tensor, " n"]
    ) -> Int[Tensor, " n"]:
        """Keys of features of the site numbered `site`; the error's number is the width."""
        where = torch.zeros_like(positions) if self.length is None else positions
        return self.firsts[site] + where * (self.widths[site] + 1) + features

    def node(self, key: int) -> SparseNode:
        """The node with this key."""
        site = self.site(key)
        position, feature = divmod(key - self.firsts[site], self.widths[site] + 1)
        return SparseNode(
            self.names[site], self.sites[site],
            None if feature == self.widths[site] else feature,
            None if self.length is None else position,
        )  # fmt: skip

    def site(self, key: int) -> int:
        """The number of the site that a key belongs to."""
        return next(s for s in range(len(self.sites)) if key < self.firsts[s + 1])

    def mask(
        self, site: int, circuits: list[tuple[Int[Tensor, " _"], bool]], device: torch.device
    ) -> Bool[Tensor, "circuits positions nodes"]:
        """Which nodes of a site are in each of `circuits`: those with its keys, or all others."""
        first, stop = self.firsts[site], self.firsts[site + 1]
        flat = torch.zeros(len(circuits), stop - first, dtype=torch.bool, device=device)
        for row, (keys, others) in enumerate(circuits):
            inside = keys[(keys >= first) & (keys < stop)] - first
            flat[row, inside.to(device)] = True
            if others:
                flat[row] = ~flat[row]
        return flat.view(len(circuits), self.length or 1, -1)
