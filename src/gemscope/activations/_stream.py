"""Shuffled activations of two sites, made on the fly, the same at every run.

Contexts are put into a seeded order and harvested a bucket at a time; the tokens of a bucket are
shuffled together, as the published recipe does with buckets of about a million. A position in the
stream is two integers, and everything after it follows from them and the seed, so an interrupted
run goes on with exactly the batches it would have seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.corpus import Context, TokenBatch, pack
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sites import Site


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the stream: a bucket, and a batch inside it."""

    bucket: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """Activations of the same tokens at the site read and the site written."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_out"]
    after: Position
    """Where the stream goes on after this batch."""


class ActivationStream:
    """Endless batches of activations from `rows`; each epoch in a new order."""

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Context],
        reads: Site,
        writes: Site,
        *,
        batch: int,
        bucket: int,
        seed: int,
        harvest: int = 16,
    ):
        self.model, self.rows, self.reads, self.writes = model, rows, reads, writes
        self.batch, self.seed, self.harvest = batch, seed, harvest
        special = set(model.tokenizer.all_special_ids)
        tokens = sum(token not in special for row in rows for token in row.ids)
        if tokens < batch:
            raise InputError(
                f"the text has {tokens} tokens that count, less than one batch of {batch}; "
                "give more text or a smaller batch"
            )
        if bucket < 2 * batch:
            raise InputError(
                f"a bucket of {bucket} tokens mixes nothing into batches of {batch}; "
                f"take {2 * batch} or more"
            )
        self.buckets = min(len(rows), -(-tokens // bucket))
        """Buckets of an epoch, of about equal size; at least one of them holds a batch."""
        self._held: tuple[int, Tensor, Tensor] | None = None

    def first_bucket(self) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """The activations of the first bucket: what scales and means are measured on."""
        return self._bucket(0)

    def batches(self, start: Position = Position()) -> Iterator[ActivationBatch]:
        """Batches from `start` on, without end. A bucket's incomplete last batch is left out."""
        bucket, first = start.bucket, start.batch
        while True:
            x, y = self._bucket(bucket)
            count = len(x) // self.batch
            for index in range(first, count):
                some = slice(index * self.batch, (index + 1) * self.batch)
                last = index + 1 == count
                after = Position(bucket + 1, 0) if last else Position(bucket, index + 1)
                yield ActivationBatch(x[some], y[some], after)
            bucket, first = bucket + 1, 0

    def _bucket(self, index: int) -> tuple[Tensor, Tensor]:
        if self._held is not None and self._held[0] == index:
            return self._held[1], self._held[2]
        self._held = None  # before the next one is made: one bucket in memory, not two
        parts = [self._harvest(batch) for batch in self._contexts(index)]
        x = torch.cat([p[0] for p in parts])
        order = torch.randperm(len(x), generator=self._generator(1, index))
        order = order.to(x.device)
        x = x[order]
        y = x if self.reads == self.writes else torch.cat([p[1] for p in parts])[order]
        self._held = (index, x, y)
        return x, y

    def _contexts(self, index: int) -> Iterator[TokenBatch]:
        epoch, place = divmod(index, self.buckets)
        order = torch.randperm(len(self.rows), generator=self._generator(0, epoch)).tolist()
        first, last = (p * len(order) // self.buckets for p in (place, place + 1))
        # Contexts of like length side by side waste little padding; the bucket is shuffled after.
        rows = sorted((self.rows[i] for i in order[first:last]), key=lambda row: len(row.ids))
        yield from pack(rows, self.model.tokenizer, batch=self.harvest, prefix=self.model.prefix)

    @torch.no_grad()
    def _harvest(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        run = self.model.run(batch, read={self.reads, self.writes})
        counts = batch.counts.to(self.model.device)
        return run[self.reads][counts].float(), run[self.writes][counts].float()

    def _generator(self, purpose: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2 + purpose) * 1_000_003 + index)
