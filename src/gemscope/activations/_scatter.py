"""Records on their way to buckets on the disk, through a fixed amount of memory.

A record is a token: its key, eight bytes, and its row of bytes at every site, one after another.
The key is a random number; the store holds the tokens in the order of their keys. So the order is
a uniformly random one, and neither the buckets nor the memory have a part in it.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._manifest import Contents
from ._progress import Bucket
from ._records import decode, encode, row_bytes
from ._sums import Sums

KEY_BYTES = 8
_PIECE = 2**22
"""Bytes that are copied at a time."""


def record_bytes(contents: Contents) -> int:
    """Bytes of a record."""
    return KEY_BYTES + sum(row_bytes(contents.dtype, d) for d in contents.sites.values())


def record_columns(contents: Contents) -> dict[str, slice]:
    """The bytes of each site in a record."""
    columns, end = {}, KEY_BYTES
    for site, width in contents.sites.items():
        begin, end = end, end + row_bytes(contents.dtype, width)
        columns[site] = slice(begin, end)
    return columns


def keys_of(records: np.ndarray) -> np.ndarray:
    """The keys of records `[n, bytes]`."""
    return records[:, :KEY_BYTES].copy().view("<i8").reshape(-1)


class Scatter:
    """Takes records, and appends each to the bucket its key is in."""

    def __init__(self, scratch: Path, buckets: Sequence[Bucket], record: int, memory: int):
        self.scratch, self.buckets = scratch, buckets
        self._lows = np.array([bucket.low for bucket in buckets], dtype=np.int64)
        self._held = np.empty((max(1, memory // record), record), np.uint8)
        self._count = 0

    def add(
        self,
        contents: Contents,
        keys: Int[Tensor, " n"],
        values: Mapping[str, Float[Tensor, "n d"]],
        sums: Sums,
    ) -> bool:
        """Take tokens; what is stored of them goes into `sums`. Whether anything was written."""
        columns, wrote = record_columns(contents), False
        step = max(1, _PIECE // self._held.shape[1])
        # Sums are over the same slices whatever the memory, so that their last bits are the same.
        for first in range(0, len(keys), step):
            some = slice(first, first + step)
            records = np.empty((len(keys[some]), self._held.shape[1]), np.uint8)
            records[:, :KEY_BYTES] = keys[some].numpy().astype("<i8")[:, None].view(np.uint8)
            for site, value in values.items():
                raw = encode(value[some], contents.dtype)
                records[:, columns[site]] = raw.cpu().numpy()
                sums.add(site, decode(raw, contents.dtype))
            wrote |= self.add_records(records)
        return wrote

    def add_records(self, records: np.ndarray) -> bool:
        """Take records that are made already; whether anything was written."""
        wrote = False
        while len(records):
            some = records[: len(self._held) - self._count]
            self._held[self._count : self._count + len(some)] = some
            self._count += len(some)
            records = records[len(some) :]
            if self._count == len(self._held):
                self.flush()
                wrote = True
        return wrote

    def flush(self) -> None:
        """Write what is held, for good; the buckets' counts follow it."""
        held = self._held[: self._count]
        which = np.searchsorted(self._lows, keys_of(held), side="right") - 1
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(len(self.buckets) + 1))
        step = max(1, _PIECE // held.shape[1])
        for bucket, (begin, end) in zip(self.buckets, pairwise(ends), strict=True):
            if begin == end:
                continue
            with bucket.file(self.scratch).open("ab") as file:
                for at in range(begin, end, step):
                    file.write(held[order[at : min(end, at + step)]].data)
                file.flush()
                os.fsync(file.fileno())
            bucket.tokens += int(end - begin)
        self._count = 0


def random_keys(count: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Keys of `count` tokens."""
    return torch.randint(0, 2**63 - 1, (count,), generator=generator)
