"""Arrays mapped straight out of an `.npz`, without a copy and without pickle.

An `.npz` is a zip of `.npy` files. Stored members (`numpy.savez`, as published) are mapped where
they lie; compressed ones are read into memory, after their size has been checked. What the zip's
directory says of a member must be what the member's own header says, and members may not overlap.
"""

import ast
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gemscope.errors import InputError

from ._facts import shown, size_of

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"<f4": ("F32", 4), "<f2": ("F16", 2), "<f8": ("F64", 8)}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ZIP64, _IN_ZIP64 = 1, 2**32 - 1
_ENCRYPTED, _STREAMED = 1, 8
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_MEMBERS = 1_000
_MOST_AXES = 16
_LONGEST_NAME = 200
_LARGEST_HEADER = 4_096
_SMALL = 64 * 2**20
_MOST_RATIO = 32
"""Compressed arrays above `_SMALL` bytes may be this many times the file: weights are hardly larger
than it, and a file that promises more is there to fill the memory."""
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """One array of an archive."""

    name: str
    dtype: str
    """As safetensors calls it; what cannot be loaded, as numpy does."""
    shape: tuple[int, ...]
    offset: int
    """Of its numbers in the file, or in the decompressed member."""
    n_bytes: int
    compressed: bool
    by_rows: bool


def read_members(file: Path) -> dict[str, Member]:
    """The arrays of `file` by name, checked against the size of the file."""
    size_of(file)
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            begins = _begins(file, archive, stream)
            members = [
                _member(file, archive, info, begin)
                for info, begin in zip(archive.infolist(), begins, strict=True)
            ]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError,
            EOFError, OverflowError, ValueError):  # fmt: skip
        raise InputError(f"{file} is not an npz file, or it is cut short: get it again") from None
    return {member.name: member for member in members}


def check_loadable(file: Path, member: Member) -> None:
    """Refuse an array whose numbers `map_tensor` cannot give."""
    if member.dtype not in [name for name, _ in _DTYPES.values()]:
        raise InputError(
            f"{file}: {member.name} is {member.dtype}, not one of {', '.join(_DTYPES)}"
        )
    if not member.by_rows:
        raise InputError(
            f"{file}: {member.name} is in column order, which no published file is: save it with "
            "numpy.ascontiguousarray"
        )


def map_tensor(file: Path, member: Member) -> "Tensor":
    """The array of `member`: mapped from the file, or decompressed."""
    import numpy as np
    import torch

    dtype = next(d for d, (name, _) in _DTYPES.items() if name == member.dtype)
    flat: np.ndarray
    try:
        if member.compressed:
            flat = np.frombuffer(_decompressed(file, member), dtype)
        else:
            # Private and writable: torch wants that, and nobody writes.
            flat = np.memmap(file, dtype, "c", member.offset, (math.prod(member.shape),))
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
    return torch.from_numpy(np.asarray(flat)).reshape(member.shape)


def _decompressed(file: Path, member: Member) -> bytearray:
    """The numbers of `member`, and never more than it was said to hold."""
    raw = bytearray(member.n_bytes)
    view = memoryview(raw)
    with zipfile.ZipFile(file) as archive, archive.open(f"{member.name}.npy") as stream:
        stream.read(member.offset)
        done = 0
        while done < len(raw):
            piece = stream.read(min(_PIECE, len(raw) - done))
            if not piece:
                raise EOFError(f"{member.name} ends after {done:,} of {len(raw):,} bytes")
            view[done : done + len(piece)] = piece
            done += len(piece)
    return raw


def _begins(file: Path, archive: zipfile.ZipFile, stream: IO[bytes]) -> list[int]:
    """Where the bytes of each member lie, after checking the directory against the file."""
    infos, end = archive.infolist(), archive.start_dir
    if len(infos) > _MOST_MEMBERS or len({i.filename for i in infos}) != len(infos):
        raise InputError(f"{file} holds {len(infos)} arrays, or one of them twice: "
                         "get the file again")  # fmt: skip
    unpacked = sum(i.file_size for i in infos if i.compress_type != zipfile.ZIP_STORED)
    if unpacked > max(_SMALL, _MOST_RATIO * end):
        raise InputError(
            f"{file} claims to hold {unpacked:,} bytes in {end:,}, compressed: weights do not "
            "shrink like that, get the file again"
        )
    begins = []
    for info in infos:
        _check_claims(file, info, end)
        begins.append(_begin(file, info, stream))
    spans = sorted(
        (info.header_offset, begin + info.compress_size)
        for info, begin in zip(infos, begins, strict=True)
    )
    after = [begin for begin, _ in spans[1:]] + [end]
    if any(stop > following for (_, stop), following in zip(spans, after, strict=True)):
        raise InputError(f"the arrays of {file} overlap, or it is cut short: get the file again")
    return begins


def _check_claims(file: Path, info: zipfile.ZipInfo, end: int) -> None:
    """Refuse a member that is no array, or that a directory at `end` leaves no room for."""
    name = info.filename.removesuffix(".npy")
    # The name of an array, not of a place outside.
    if name == info.filename or len(name) > _LONGEST_NAME or not name.replace("_", "").isalnum():
        raise InputError(
            f"{file} holds {shown(info.filename)}, which is no array: get the file again"
        )
    if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
        raise InputError(f"{file}: {name} is compressed or encrypted in a way numpy does not write")
    stored = info.compress_type == zipfile.ZIP_STORED
    if (
        not 0 <= info.header_offset <= end - _LOCAL_HEADER.size - info.compress_size
        or (stored and info.file_size != info.compress_size)
    ):  # fmt: skip
        raise InputError(
            f"{file}: {name} claims {info.file_size:,} bytes, which is not what a file of {end:,} "
            "holds: get the file again"
        )


def _begin(file: Path, info: zipfile.ZipInfo, stream: IO[bytes]) -> int:
    """Where the bytes of a member lie, after checking that its own header says the same of it."""
    stream.seek(info.header_offset)
    _, _, flags, method, _, _, _, packed, unpacked, n_name, n_extra = _LOCAL_HEADER.unpack(
        stream.read(_LOCAL_HEADER.size)
    )
    stream.seek(n_name, 1)
    sizes = (unpacked, packed)
    if _IN_ZIP64 in sizes:
        sizes = _zip64_sizes(stream.read(n_extra))
    # What was written to a stream has its sizes behind it, and none before.
    told = flags & _STREAMED or sizes == (info.file_size, info.compress_size)
    if not told or method != info.compress_type or flags & _ENCRYPTED:
        raise InputError(
            f"{file} says one thing of {info.filename} in its directory and another beside it: "
            "get the file again"
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


def _member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, begin: int) -> Member:
    name, compressed = info.filename.removesuffix(".npy"), info.compress_type != zipfile.ZIP_STORED
    with archive.open(info) as opened:
        head = opened.read(min(_LARGEST_HEADER, info.file_size))
    descr, shape, by_rows, skipped = _npy_header(file, name, head)
    dtype, width = _DTYPES.get(descr, (descr, None))
    n_bytes = info.file_size - skipped
    if width is not None and math.prod(shape) * width != n_bytes:
        raise InputError(f"{file}: {name} is {list(shape)} and {info.file_size:,} bytes long: "
                         "get the file again")  # fmt: skip
    offset = skipped if compressed else begin + skipped
    return Member(name, dtype, shape, offset, n_bytes, compressed, by_rows)


def _npy_header(file: Path, name: str, head: bytes) -> tuple[str, tuple[int, ...], bool, int]:
    """Type, shape and order in the header of a `.npy`, and its length."""
    try:
        if head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
            raise ValueError("no npy header")
        form = "<H" if head[6] == 1 else "<I"
        begin = 8 + struct.calcsize(form)
        end = begin + struct.unpack_from(form, head, 8)[0]
        # An escape would make Python's parser print a warning.
        if end > len(head) or b"\\" in head[begin:end]:
            raise ValueError("not the header of an array")
        raw = ast.literal_eval(head[begin:end].decode("latin1"))
        descr, by_columns, shape = raw["descr"], raw["fortran_order"], raw["shape"]
        if not (isinstance(shape, tuple) and len(shape) <= _MOST_AXES and type(by_columns) is bool):
            raise ValueError("not a shape")
        if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ValueError("not a size")
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError, struct.error, MemoryError,
            RecursionError):  # fmt: skip
        raise InputError(
            f"{file}: the header of {name} cannot be read: get the file again"
        ) from None
    if isinstance(descr, str) and descr.lstrip("<>|=").lower().startswith("o"):
        raise InputError(f"{file}: {name} holds Python objects, which are never loaded")
    descr = descr if isinstance(descr, str) and descr in _DTYPES else shown(descr)
    return descr, shape, not by_columns or len(shape) < 2, end
