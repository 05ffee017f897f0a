"""Which tokens are served in which round: arithmetic on row lengths, no activations.

An epoch's rows are put into a seeded order and cut into blocks of about equal tokens. The tokens
of a block are dealt to `PARTS` parts, and round `r` serves, shuffled together, part 0 of block
`r`, part 1 of block `r - 1`, and so on. A round mixes the text of `PARTS` blocks, every token is
served once an epoch, and what has to be held at any time are the last `PARTS` blocks, of which
what is still to be served is `(PARTS + 1) / 2` blocks. Blocks are numbered through the epochs;
there is none before block 0, so the first rounds are smaller.
"""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from ._seeds import generator

PARTS = 4


class Blocks:
    """The blocks and rounds of rows that have `counts` tokens to serve."""

    def __init__(self, counts: Int[Tensor, " rows"], per_epoch: int, seed: int):
        self.counts, self.per_epoch, self.seed = counts, per_epoch, seed
        self.tokens = int(counts.sum())
        # A round looks at the epochs of its blocks, and at those of the round behind it.
        self._epoch = lru_cache(maxsize=2 * PARTS)(self._ordered)

    def _ordered(self, epoch: int) -> tuple[Tensor, list[int], list[int]]:
        """The order of an epoch's rows; the row and the token each block begins at, and the end."""
        order = torch.randperm(len(self.counts), generator=generator(self.seed, "rows", epoch))
        ends = self.counts[order].cumsum(0)
        begins = torch.cat([ends.new_zeros(1), ends])
        wanted = torch.arange(self.per_epoch + 1) * self.tokens // self.per_epoch
        # The first border between rows at or behind each wanted place.
        edges = torch.searchsorted(begins, wanted)
        return order, edges.tolist(), begins[edges].tolist()

    def rows(self, block: int) -> list[int]:
        """Indices of the rows of `block`."""
        epoch, place = divmod(block, self.per_epoch)
        order, edges, _ = self._epoch(epoch)
        return order[edges[place] : edges[place + 1]].tolist()

    def ahead(self, block: int) -> int:
        """Tokens of all blocks before `block`."""
        if block <= 0:
            return 0
        epoch, place = divmod(block, self.per_epoch)
        return epoch * self.tokens + self._epoch(epoch)[2][place]

    def size(self, block: int) -> int:
        """Tokens of `block`."""
        return self.ahead(block + 1) - self.ahead(block)

    def part(self, block: int, number: int) -> Int[Tensor, " n"]:
        """The places, in the block, of the tokens of one part."""
        order = torch.randperm(self.size(block), generator=generator(self.seed, "parts", block))
        first, last = self._edges(block, number)
        return order[first:last]

    def mixed(self, round_: int) -> Int[Tensor, " n"]:
        """The order of a round's tokens, of those of its parts one after another."""
        count = self.before(round_ + 1) - self.before(round_)
        return torch.randperm(count, generator=generator(self.seed, "round", round_))

    def before(self, round_: int) -> int:
        """Tokens served in all rounds before `round_`."""
        if round_ <= 0:
            return 0
        unserved = 0
        for back in range(1, PARTS):
            block = round_ - back
            if block >= 0:
                unserved += self.size(block) - self._edges(block, back)[0]
        return self.ahead(round_) - unserved

    def _edges(self, block: int, number: int) -> tuple[int, int]:
        size = self.size(block)
        return number * size // PARTS, (number + 1) * size // PARTS
