"""Arrays mapped straight out of an `.npz`, without a copy and without pickle.

An `.npz` is a zip of `.npy` files. Stored members (`numpy.savez`, as published) are mapped where
they lie; compressed ones are read into memory, after their size has been checked.
"""

import ast
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemscope.errors import InputError

from ._facts import shown
from ._zip import Packed, opened_zip

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"<f4": ("F32", 4), "<f2": ("F16", 2), "<f8": ("F64", 8)}
_MOST_AXES = 16
_LONGEST_NAME = 200
_LARGEST_HEADER = 4_096
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
    with opened_zip(file) as (archive, found):
        members = [_member(file, archive, packed) for packed in found]
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


def _member(file: Path, archive: zipfile.ZipFile, packed: Packed) -> Member:
    info = packed.info
    name = info.filename.removesuffix(".npy")
    # The name of an array, not of a place outside.
    if name == info.filename or len(name) > _LONGEST_NAME or not name.replace("_", "").isalnum():
        raise InputError(
            f"{file} holds {shown(info.filename)}, which is no array: get the file again"
        )
    with archive.open(info) as opened:
        head = opened.read(min(_LARGEST_HEADER, info.file_size))
    descr, shape, by_rows, skipped = _npy_header(file, name, head)
    dtype, width = _DTYPES.get(descr, (descr, None))
    n_bytes = info.file_size - skipped
    if width is not None and math.prod(shape) * width != n_bytes:
        raise InputError(f"{file}: {name} is {list(shape)} and {info.file_size:,} bytes long: "
                         "get the file again")  # fmt: skip
    offset = skipped if packed.compressed else packed.begin + skipped
    return Member(name, dtype, shape, offset, n_bytes, packed.compressed, by_rows)


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
