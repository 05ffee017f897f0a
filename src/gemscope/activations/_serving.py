"""Which rows of which shard an activation store serves when: arithmetic on its sizes.

A round is a shard; each epoch has its own order of shards. A shard's chunks, the runs of rows that
have a checksum, are served as they are stored in epoch 0 and in a new order in each later epoch,
so that batches are made up anew. The stored order is a random one already.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ._cutting import Cutting
from ._manifest import Contents
from ._seeds import generator


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` to `last` of a chunk of a shard."""

    shard: int
    chunk: int
    first: int
    last: int


class Serving:
    """The order of everything, for one seed."""

    def __init__(self, contents: Contents, batch: int, seed: int):
        self.contents, self.batch, self.seed = contents, batch, seed
        self.cutting = Cutting(batch, self.before)
        self._order = lru_cache(maxsize=4)(self._shuffled_shards)
        self._chunks = lru_cache(maxsize=4)(self._shuffled_chunks)

    def before(self, round_: int) -> int:
        """Tokens of all rounds before `round_`."""
        epoch, place = divmod(round_, self.contents.shards)
        missing = self.contents.shards * self.contents.shard - self.contents.tokens
        _, of_short = self._order(epoch)
        short = missing if of_short < place else 0
        return epoch * self.contents.tokens + place * self.contents.shard - short

    def pieces(self, first: int, last: int, round_: int) -> Iterator[Piece]:
        """Tokens `first` to `last` of the row of rounds, of which `first` is in `round_`."""
        while first < last:
            start = self.before(round_)
            shard, chunks, edges = self._chunks(round_)
            place = bisect_right(edges, first - start) - 1
            while place < len(chunks) and first < last:
                row = first - start - edges[place]
                end = min(edges[place + 1] - edges[place], row + last - first)
                yield Piece(shard, chunks[place], row, end)
                first, place = first + end - row, place + 1
            round_ += 1

    def _shuffled_shards(self, epoch: int) -> tuple[list[int], int]:
        """The order of an epoch's shards, and where in it the last shard is, the short one."""
        seeded = generator(self.seed, "shards", epoch)
        order = torch.randperm(self.contents.shards, generator=seeded).tolist()
        return order, order.index(self.contents.shards - 1)

    def _shuffled_chunks(self, round_: int) -> tuple[int, list[int], list[int]]:
        """A round's shard, the order of its chunks, and the token each begins at, and the end."""
        epoch, place = divmod(round_, self.contents.shards)
        shard = self._order(epoch)[0][place]
        tokens, size = self.contents.shard_tokens(shard), self.contents.chunk
        count = -(-tokens // size)
        seeded = generator(self.seed, "chunks", round_)
        chunks = torch.randperm(count, generator=seeded).tolist() if epoch else list(range(count))
        edges = [0]
        for chunk in chunks:
            edges.append(edges[-1] + min(size, tokens - chunk * size))
        return shard, chunks, edges
