"""Chunks of shards off the disk into memory that is theirs to the end, checked the first time."""

import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ._checksum import checksum
from ._manifest import Manifest, file_name
from ._memory import Memory
from ._place import Place
from ._serving import Piece
from ._shard_file import ShardFile


class Corrupt(Exception):  # noqa: N818
    """A file that is not what the manifest says."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Checked:
    """What has been checked of the shards of a store, and what is known to be bad."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.bad: set[str] = set()
        """Files that cannot be read at all."""
        self.memory = Memory()
        self._good: dict[str, np.ndarray] = {}

    def good(self, site: str, shard: int) -> np.ndarray:
        """Of each chunk of a shard, whether it has been found intact; to be written to."""
        name = file_name(site, shard)
        if name not in self._good:
            chunks = self.manifest.contents.file(site, shard).chunks
            self._good[name] = np.zeros(chunks, np.bool_)
        return self._good[name]


class _Open:
    """A shard of one site, open, and the checksums it comes with."""

    def __init__(self, layout: ShardFile, name: str, path: Path, expected: int, good: np.ndarray):
        self.layout, self.name, self.good = layout, name, good
        self.first_row, self.row = layout.first_row, layout.row_bytes
        try:
            self.file: BinaryIO = path.open("rb", buffering=0)
        except OSError:
            raise Corrupt(name) from None
        header = layout.header
        found = self.file.read(self.first_row)
        raw = found[len(header) :]
        if found[: len(header)] != header or zlib.crc32(raw) != expected:
            self.file.close()
            raise Corrupt(name)
        self.checksums = np.frombuffer(raw, "<u4")

    def read(self, first: int, rows: np.ndarray) -> None:
        """Fill `rows` with the file's, from row `first` on."""
        self.file.seek(self.first_row + first * self.row)
        view, done = rows.reshape(-1).data, 0
        while done < len(view):
            got = self.file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise Corrupt(self.name)
            done += got

    def read_chunk(self, chunk: int, rows: np.ndarray) -> None:
        """Fill `rows` with a whole chunk, which is checked."""
        self.read(chunk * self.layout.chunk, rows)
        if not self.good[chunk]:
            if checksum(rows) != self.checksums[chunk]:
                raise Corrupt(self.name)
            self.good[chunk] = True


class Chunks:
    """Reads pieces of the shards of some sites; one thread at a time may use it."""

    def __init__(self, place: Place, checked: Checked):
        self.place, self.checked = place, checked
        self._open: dict[str, tuple[int, _Open]] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        """Where what is elsewhere is copied to."""

    def close(self) -> None:
        """Close files, and remove what was copied from elsewhere."""
        for _, held in self._open.values():
            held.file.close()
        if self._copies is not None:
            self._copies.cleanup()

    def read(self, site: str, pieces: Iterable[Piece], count: int) -> np.ndarray:
        """The rows of `pieces`, `count` in all, as bytes in memory of their own.

        To be held by a tensor made of the whole: see `Memory`.
        """
        row = self.checked.manifest.contents.file(site, 0).row_bytes
        out = self.checked.memory.take(count, row)
        done = 0
        for piece in pieces:
            rows = out[done : done + piece.last - piece.first]
            done += len(rows)
            self._read_piece(site, piece, rows)
        return out

    def _read_piece(self, site: str, piece: Piece, rows: np.ndarray) -> None:
        shard = self._shard(site, piece.shard)
        first = piece.chunk * shard.layout.chunk
        size = min(shard.layout.chunk, shard.layout.tokens - first)
        if len(rows) == size:
            shard.read_chunk(piece.chunk, rows)
        elif shard.good[piece.chunk]:
            shard.read(first + piece.first, rows)
        else:
            whole = self.checked.memory.take(size, shard.row)
            shard.read_chunk(piece.chunk, whole)
            rows[:] = whole[piece.first : piece.last]

    def _shard(self, site: str, index: int) -> _Open:
        at, held = self._open.get(site, (None, None))
        if held is not None and at == index:
            return held
        if held is not None:
            held.file.close()
            del self._open[site]
            if self._copies is not None:
                Path(held.file.name).unlink()
        name = file_name(site, index)
        if name in self.checked.bad:
            raise Corrupt(name)
        manifest = self.checked.manifest
        path = self._on_this_machine(name)
        layout, good = manifest.contents.file(site, index), self.checked.good(site, index)
        made = _Open(layout, name, path, manifest.checksums[index][site], good)
        self._open[site] = (index, made)
        return made

    def _on_this_machine(self, name: str) -> Path:
        if self.place.local is not None:
            return self.place.local / name
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="gemscope-store-")
        return self.place.fetch(name, Path(self._copies.name))
