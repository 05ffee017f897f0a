"""Shuffled activations made on the fly, the same at every run.

Which tokens are served when is arithmetic (`_blocks.py`); this file runs the model and keeps what
is not served yet in a ring of slots. A block is written into the slots that the round before has
freed, so the activations are in memory once. To go on at a position, the blocks that have tokens
left there are harvested again, in the same forward passes, which gives the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.corpus import Context, TokenBatch
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sites import Site

from ._blocks import PARTS, Blocks
from ._cutting import Cutting
from ._forward import Forward
from ._ring import Ring
from ._seeds import generator
from ._source import ActivationBatch, Position


class ActivationStream:
    """Endless batches of activations from `rows`; each epoch in a new order.

    `buffer` is how many tokens are held in memory, in `dtype`, at every site; `harvest` is how many
    rows go through the model at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Context],
        sites: Sequence[Site],
        *,
        batch: int,
        buffer: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        harvest: int = 16,
    ):
        self.model, self.sites = model, tuple(dict.fromkeys(sites))
        self.batch, self.seed, self.dtype, self.harvest = batch, seed, dtype, harvest
        self._forward = Forward(model, self.sites)
        counts = self._forward.counted(rows)
        self.rows = [row for row, count in zip(rows, counts.tolist(), strict=True) if count]
        counts = counts[counts > 0]
        self.tokens = int(counts.sum())
        if self.tokens < batch:
            raise InputError(
                f"the text has {self.tokens} tokens that count, less than one batch of {batch}; "
                "give more text or a smaller batch"
            )
        longest = int(counts.max())
        room = _room(batch, buffer, longest)
        # What is held of all blocks is (PARTS + 1) / 2 of one.
        per_epoch = -(-(PARTS + 1) * self.tokens // (2 * room))
        held = (PARTS + 1) * self.tokens // (2 * per_epoch)
        self.capacity = min(buffer, held + batch + longest + PARTS)
        """Tokens the ring has slots for: `buffer`, or less where the text does not fill it."""
        self.blocks = Blocks(counts, per_epoch, seed)
        self._cutting = Cutting(batch, self.blocks.before)

    @property
    def model_seconds(self) -> float:
        """Time spent in the language model so far."""
        return self._forward.seconds

    def sample(self, tokens: int) -> dict[Site, Float[Tensor, "n d"]]:
        """Up to `tokens` shuffled activations of the first blocks, in float32."""
        blocks = 1
        while blocks < self.blocks.per_epoch and self.blocks.ahead(blocks) < tokens:
            blocks += 1
        count = self.blocks.ahead(blocks)
        goes_to = torch.randperm(count, generator=generator(self.seed, "sample"))
        kept = min(tokens, count)
        ring = Ring(self._forward.widths, kept, torch.float32, self.model.device)
        done = 0
        for block in range(blocks):
            for batch in self._packed(block):
                slots = goes_to[done : done + batch.n_counted]
                done += len(slots)
                _put(ring, slots, slots < kept, self._forward.read(batch))
        return ring.values

    def batches(
        self, start: Position = Position(), stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ActivationBatch]:
        """Batches from `start` on, without end; `stopping` is asked between forward passes."""
        number, first = self._cutting.start(start)
        ring = Ring(self._forward.widths, self.capacity, self.dtype, self.model.device)
        held: dict[int, Tensor] = {}  # the slots of the tokens of each block
        for block in range(max(0, first - PARTS + 1), first):
            if not self._fill(ring, held, block, first - block, stopping):
                return
        waiting = torch.zeros(0, dtype=torch.int64)  # slots, in the order they are served in
        round_ = first
        while self._fill(ring, held, round_, 0, stopping):
            waiting = torch.cat([waiting, self._served(held, round_)])
            if round_ == first:
                passed = number * self.batch - self.blocks.before(first)
                ring.release(waiting[:passed])
                waiting = waiting[passed:]
            while len(waiting) >= self.batch:
                if stopping():
                    return
                slots, waiting = waiting[: self.batch], waiting[self.batch :]
                values = ring.gather(slots)
                ring.release(slots)
                yield ActivationBatch(values, self._cutting.after(number, round_))
                number += 1
            round_ += 1

    def _served(self, held: dict[int, Tensor], round_: int) -> Tensor:
        """The slots of the tokens of a round, mixed; a block all of which is served is let go."""
        parts = [
            held[round_ - number][self.blocks.part(round_ - number, number)]
            for number in range(PARTS)
            if round_ - number in held
        ]
        held.pop(round_ - PARTS + 1, None)
        return torch.cat(parts)[self.blocks.mixed(round_)]

    def _fill(
        self,
        ring: Ring,
        held: dict[int, Tensor],
        block: int,
        first: int,
        stopping: Callable[[], bool],
    ) -> bool:
        """Harvest `block` into `ring`, its parts from `first` on; whether it came to the end."""
        slots = torch.full((self.blocks.size(block),), -1)
        for number in range(first, PARTS):
            part = self.blocks.part(block, number)
            slots[part] = ring.take(len(part))
        done = 0
        for batch in self._packed(block):
            if stopping():
                return False
            some = slots[done : done + batch.n_counted]
            done += len(some)
            _put(ring, some, some >= 0, self._forward.read(batch))
        held[block] = slots
        return True

    def _packed(self, block: int) -> Iterator[TokenBatch]:
        # Rows of like length side by side waste little padding; their tokens are shuffled after.
        rows = sorted((self.rows[i] for i in self.blocks.rows(block)), key=lambda r: len(r.ids))
        yield from self._forward.packed(rows, self.harvest)


def _put(ring: Ring, slots: Tensor, wanted: Tensor, values: dict[Site, Tensor]) -> None:
    if not wanted.all():
        values = {site: value[wanted.to(value.device)] for site, value in values.items()}
    ring.put(slots[wanted], values)


def _room(batch: int, buffer: int, longest: int) -> int:
    """Tokens of a buffer that blocks may fill: beside them wait the tokens of a batch under way.

    A block may be longer than its share by a row, and by a token for each of its parts.
    """
    if batch > buffer // 2:
        raise InputError(
            f"a buffer of {buffer} tokens mixes nothing into batches of {batch}; "
            f"take {2 * batch} or more"
        )
    room = buffer - batch - longest - PARTS
    if room < longest:
        least = batch + 2 * longest + PARTS
        raise InputError(
            f"a buffer of {buffer} tokens has no room for contexts of {longest} tokens beside a "
            f"batch of {batch}; take {least} or more, or shorter contexts"
        )
    return room
