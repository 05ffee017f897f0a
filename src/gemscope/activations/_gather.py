"""Buckets to shards: each bucket in memory once, sorted by key, and written out site by site."""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ._checksum import Checksum
from ._manifest import Contents, file_name
from ._place import Place
from ._progress import Bucket, Progress, buckets
from ._scatter import Scatter, keys_of, record_bytes, record_columns

_PIECE = 2**22
"""Bytes that are copied at a time."""
_MOST_BUCKETS = 256
"""A file each; where more are needed, buckets are divided again."""


def bucket_count(size: int, memory: int) -> int:
    """How many buckets to divide `size` bytes into, so that one fits well into `memory`."""
    # A fifth is left for chance: bucket sizes vary.
    return min(_MOST_BUCKETS, max(1, -(-size * 5 // (memory * 4))))


class _Part:
    """A file of a shard of one site while it is written."""

    def __init__(self, contents: Contents, site: str, index: int, path: Path):
        self.site, self.path = site, path
        self.layout = contents.file(site, index)
        self._file: BinaryIO = path.open("wb")
        self._file.write(self.layout.header + bytes(4 * self.layout.chunks))
        self._checksum, self._rows = Checksum(), 0
        self._sums: list[int] = []

    def add(self, rows: np.ndarray) -> None:
        self._file.write(rows.data)
        while len(rows):
            room = self.layout.chunk - self._rows % self.layout.chunk
            self._checksum.add(rows[:room])
            self._rows += len(rows[:room])
            rows = rows[room:]
            if self._rows % self.layout.chunk == 0 or self._rows == self.layout.tokens:
                self._sums.append(self._checksum.value())
                self._checksum = Checksum()

    def finish(self) -> int:
        """Close the file, whole; the CRC-32 of its checksums."""
        raw = np.array(self._sums, "<u4").tobytes()
        self._file.seek(len(self.layout.header))
        self._file.write(raw)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return zlib.crc32(raw)

    def close(self) -> None:
        self._file.close()


class Gather:
    """The second half of a harvest: from `progress`' buckets to the shards of `place`."""

    def __init__(self, progress: Progress, place: Place, memory: int):
        self.progress, self.place, self.memory = progress, place, memory
        self.contents = progress.state.contents
        self.record = record_bytes(self.contents)
        self.columns = record_columns(self.contents)
        self._parts: list[_Part] = []
        self._left = 0
        """Tokens the shard being written still wants."""

    def run(self, report: Callable[[int], None], stopping: Callable[[], bool]) -> bool:
        """Write the shards that are not there yet; whether it came to the end.

        `report` is told the tokens written, `stopping` asked now and then.
        """
        state = self.progress.state
        done = min(self.contents.tokens, len(state.shards) * self.contents.shard)
        try:
            for records in self._sorted(done):
                if stopping():
                    return False
                self._write(records)
                done += len(records)
                report(done)
        finally:
            for part in self._parts:
                part.close()
        return True

    def _sorted(self, skip: int) -> Iterator[np.ndarray]:
        """Records in the order of their keys, some at a time, without the first `skip`."""
        state, start, place = self.progress.state, 0, 0
        while place < len(state.buckets):
            bucket = state.buckets[place]
            if start + bucket.tokens > skip:
                if bucket.tokens * self.record > self.memory and bucket.high - bucket.low > 1:
                    self._divide(place)
                    continue
                yield from self._of(bucket, max(0, skip - start))
            start, place = start + bucket.tokens, place + 1

    def _of(self, bucket: Bucket, skip: int) -> Iterator[np.ndarray]:
        size = bucket.tokens * self.record
        records = np.fromfile(bucket.file(self.progress.scratch), np.uint8, size)
        records = records.reshape(bucket.tokens, self.record)
        order = np.argsort(keys_of(records), kind="stable")
        step = max(1, _PIECE // self.record)
        for at in range(skip, bucket.tokens, step):
            yield records[order[at : at + step]]

    def _divide(self, place: int) -> None:
        """Put smaller buckets in the place of one that memory cannot hold."""
        state, scratch = self.progress.state, self.progress.scratch
        whole = state.buckets[place]
        count = max(2, bucket_count(whole.tokens * self.record, self.memory))
        parts = buckets(whole.low, whole.high, min(count, whole.high - whole.low))
        for part in parts:
            part.file(scratch).unlink(missing_ok=True)  # of a division that was cut short
        scatter = Scatter(scratch, parts, self.record, self.memory // 2)
        step = max(1, _PIECE // self.record)
        with whole.file(scratch).open("rb") as file:
            while raw := file.read(step * self.record):
                scatter.add_records(np.frombuffer(raw, np.uint8).reshape(-1, self.record))
        scatter.flush()
        state.buckets[place : place + 1] = parts
        self.progress.save()
        whole.file(scratch).unlink()

    def _write(self, records: np.ndarray) -> None:
        while len(records):
            if not self._left:
                self._open()
            some = records[: self._left]
            for part in self._parts:
                part.add(np.ascontiguousarray(some[:, self.columns[part.site]]))
            self._left -= len(some)
            records = records[len(some) :]
            if not self._left:
                self._publish()

    def _open(self) -> None:
        index = len(self.progress.state.shards)
        self._left = self.contents.shard_tokens(index)
        self._parts = []
        for site in self.contents.sites:
            path = self.place.near(file_name(site, index), self.progress.scratch)
            self._parts.append(_Part(self.contents, site, index, path))

    def _publish(self) -> None:
        """Close the shard, put it into the store, and let go of buckets that are all in it."""
        state = self.progress.state
        checksums = {part.site: part.finish() for part in self._parts}
        for part in self._parts:
            self.place.publish(part.path, file_name(part.site, len(state.shards)))
        self._parts = []
        state.shards.append(checksums)
        self.progress.save()
        written, start = len(state.shards) * self.contents.shard, 0
        for bucket in state.buckets:
            start += bucket.tokens
            if start <= written:
                bucket.file(self.progress.scratch).unlink(missing_ok=True)
