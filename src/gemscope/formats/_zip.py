"""Zip archives of weights: where the members' bytes lie, for readers that map them.

Reading a member through `zipfile` ends at once if something is wrong; whoever maps its bytes has to
know before. So what the directory says of a member must be what the member's own header says, all
of it must lie in the file, and no byte may belong to two members.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from gemscope.errors import InputError

from ._facts import shown, size_of

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ZIP64, _IN_ZIP64 = 1, 2**32 - 1
_ENCRYPTED, _STREAMED, _UTF8 = 1, 8, 2**11
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_MEMBERS = 1_000
_SMALL = 64 * 2**20
_MOST_RATIO = 32
"""Compressed members above `_SMALL` bytes may be this many times the file: weights are hardly
larger than it, and a file that promises more is there to fill the memory."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One member of an archive."""

    info: zipfile.ZipInfo
    begin: int
    """Of its bytes in the file."""

    @property
    def compressed(self) -> bool:
        """Whether its bytes are not its content."""
        return self.info.compress_type != zipfile.ZIP_STORED


@contextmanager
def opened_zip(file: Path) -> Iterator[tuple[zipfile.ZipFile, list[Packed]]]:
    """The archive `file` and its members, checked against each other and the size of the file.

    What damage makes `zipfile` raise, then and in the block, is told as damage.
    """
    size_of(file)
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            yield archive, _members(file, archive, stream)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    # NotImplementedError is zipfile's word for a compression or version it does not know.
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError,
            EOFError, OverflowError, ValueError):  # fmt: skip
        raise InputError(
            f"{file} is not a zip archive, or it is damaged or cut short: get it again"
        ) from None


def _members(file: Path, archive: zipfile.ZipFile, stream: IO[bytes]) -> list[Packed]:
    infos, end = archive.infolist(), archive.start_dir
    if len(infos) > _MOST_MEMBERS or len({i.filename for i in infos}) != len(infos):
        raise InputError(f"{file} holds {len(infos)} members, or one of them twice: "
                         "get the file again")  # fmt: skip
    unpacked = sum(i.file_size for i in infos if i.compress_type != zipfile.ZIP_STORED)
    if unpacked > max(_SMALL, _MOST_RATIO * end):
        raise InputError(
            f"{file} claims to hold {unpacked:,} bytes in {end:,}, compressed: weights do not "
            "shrink like that, get the file again"
        )
    members = []
    for info in infos:
        _check_claims(file, info, end)
        members.append(Packed(info, _begin(file, info, stream)))
    spans = sorted((m.info.header_offset, m.begin + m.info.compress_size) for m in members)
    if any(stop > begin for (_, stop), (begin, _) in pairwise([*spans, (end, end)])):
        raise InputError(f"the members of {file} overlap, or it is cut short: get the file again")
    return members


def _check_claims(file: Path, info: zipfile.ZipInfo, end: int) -> None:
    """Refuse a member that cannot be read, or that a directory at `end` leaves no room for."""
    if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
        raise InputError(
            f"{file}: {shown(info.filename)} is encrypted, or compressed in a way that cannot be "
            "read: get the file again"
        )
    stored = info.compress_type == zipfile.ZIP_STORED
    if (
        not 0 <= info.header_offset <= end - _LOCAL_HEADER.size - info.compress_size
        or (stored and info.file_size != info.compress_size)
    ):  # fmt: skip
        raise InputError(
            f"{file}: {shown(info.filename)} claims {info.file_size:,} bytes, which is not what a "
            f"file of {end:,} holds: get the file again"
        )


def _begin(file: Path, info: zipfile.ZipInfo, stream: IO[bytes]) -> int:
    """Where the bytes of a member lie, after checking that its own header says the same of it."""
    stream.seek(info.header_offset)
    mark, _, flags, method, _, _, _, packed, unpacked, n_name, n_extra = _LOCAL_HEADER.unpack(
        stream.read(_LOCAL_HEADER.size)
    )
    name, sizes = stream.read(n_name), (unpacked, packed)
    if _IN_ZIP64 in sizes:
        sizes = _zip64_sizes(stream.read(n_extra))
    # What was written to a stream has its sizes behind it, and none before.
    told = flags & _STREAMED or sizes == (info.file_size, info.compress_size)
    coding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    same = told and method == info.compress_type and name == info.orig_filename.encode(coding)
    if not same or flags & _ENCRYPTED or mark != b"PK\3\4":
        raise InputError(
            f"{file} says one thing of {shown(info.filename)} in its directory and another beside "
            "it: get the file again"
        )
    return info.header_offset + _LOCAL_HEADER.size + n_name + n_extra


def _zip64_sizes(extra: bytes) -> tuple[int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64 and length >= 16:
            unpacked, packed = struct.unpack_from("<2Q", extra, at + 4)
            return unpacked, packed
        at += 4 + length
    raise zipfile.BadZipFile("sizes that are nowhere")
