"""Where a feature fires, and where it is known to be silent; which documents explain or score."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gemscope.features import Store, Text


@dataclass(frozen=True, slots=True)
class Firing:
    """The activations of one feature."""

    feature: int
    places: np.ndarray
    """int64, ascending."""
    values: np.ndarray
    """float32."""
    known: np.ndarray
    """int64 `[n, 2]`: stretches of the text, ascending, outside of which nothing is known."""

    def silent(self, first: int, stop: int) -> bool:
        """Whether the feature is known to fire nowhere from `first` to before `stop`."""
        row = int(np.searchsorted(self.known[:, 0], first, side="right")) - 1
        if row < 0 or stop > self.known[row, 1]:
            return False
        low, high = np.searchsorted(self.places, [first, stop])
        return bool(low == high)


class Firings:
    """The activations of a dictionary's features: all of them where the index kept them, else
    those in the contexts of the store.
    """

    def __init__(self, store: Store, address: str):
        self.store, self.address = store, address
        self.activations = store.activations(address)
        self.of = lru_cache(maxsize=256)(self._of)

    @cached_property
    def _rows(self) -> Any:
        return self.store.features(self.address, ["count", "neighbours", "promoted"])

    def row(self, feature: int) -> dict[str, Any]:
        """`count`, `neighbours` and `promoted` of a feature."""
        return self._rows.slice(feature, 1).to_pylist()[0]

    @cached_property
    def text(self) -> Text:
        """The text that was indexed."""
        return self.store.text(self.address)

    def near(self, feature: int) -> np.ndarray:
        """Places where a feature nearly fires, in contexts where it is silent."""
        if self.activations is not None:
            return self.activations.near(self.address, feature, feature + 1).places
        rows = self.store.contexts(self.address, feature)
        return np.array([r["place"] for r in rows if r["group"] == "near"], dtype=np.int64)

    def _of(self, feature: int) -> Firing:
        if self.activations is not None:
            places, values = self.activations.of(self.address, feature)
            everything = np.array([[0, len(self.text.ids)]], dtype=np.int64)
            return Firing(feature, places, values, everything)
        rows = self.store.contexts(self.address, feature)
        return from_contexts(feature, rows, self.text)


def from_contexts(feature: int, rows: list[dict[str, Any]], text: Text) -> Firing:
    """What the contexts of a store say of a feature: within each, every firing is told."""
    found: dict[int, float] = {}
    contexts = sorted({int(row["context"]) for row in rows})
    for row in rows:
        first = int(text.offsets[row["context"]])
        found |= {first + int(p): float(v) for p, v in
                  zip(row["positions"], row["values"], strict=True)}  # fmt: skip
    places = np.array(sorted(found), dtype=np.int64)
    return Firing(
        feature,
        places,
        np.array([found[p] for p in places.tolist()], dtype=np.float32),
        np.array([text.offsets[c : c + 2] for c in contexts], dtype=np.int64).reshape(-1, 2),
    )


@dataclass(frozen=True)
class Sides:
    """For each feature, documents to explain from and others to score on, by a hash of their paths.

    The documents in which a feature fires take turns in the order of the hash, so that each side
    has half of them; the others go by the hash alone. Documents of one path or of the same tokens
    are on one side.
    """

    text: Text
    seed: int

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each document its group's rank in the order of the hash; and the hash's side."""
        groups: list[bytes] = []
        by_path: dict[str, int] = {}
        by_tokens: dict[bytes, int] = {}
        member = []
        borders = np.searchsorted(self.text.document, np.arange(len(self.text.paths) + 1))
        for path, first, stop in zip(self.text.paths, borders, borders[1:], strict=False):
            ids = self.text.ids[self.text.offsets[first] : self.text.offsets[stop]]
            tokens = hashlib.sha256(ids.tobytes()).digest()
            group = by_path.get(path, by_tokens.get(tokens, len(groups)))
            if group == len(groups):
                groups.append(hashlib.sha256(f"{self.seed}\0{path}".encode()).digest())
            by_path[path] = by_tokens[tokens] = group
            member.append(group)
        rank = np.empty(len(groups), dtype=np.int64)
        rank[sorted(range(len(groups)), key=lambda g: groups[g])] = np.arange(len(groups))
        side = np.array([bool(group[-1] & 1) for group in groups], dtype=bool)
        return rank[member], side[member]

    def explaining(self, firing: Firing) -> np.ndarray:
        """True for the documents that a feature is explained from, bool `[n_documents]`."""
        order, side = self._order
        out = side.copy()
        if len(firing.places):
            ranks = np.unique(order[self.text.document_of(firing.places)])
            turn = np.full(int(order.max()) + 1, -1)
            turn[ranks] = np.arange(len(ranks)) % 2
            fires = turn[order] >= 0
            out[fires] = turn[order][fires] == 0
        return out
