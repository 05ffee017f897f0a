"""Headers of safetensors files, read and checked without loading anything.

A safetensors file is: the length of the header (8 bytes, little-endian), the header (JSON: name to
dtype, shape and byte range), the bytes. Nothing here imports torch, so that listing is fast.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from gemscope.errors import InputError

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
               "U8": 1, "BOOL": 1}  # fmt: skip
_LARGEST_HEADER = 100 * 2**20  # the limit of the format's own library


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file`, after checking that the file holds the bytes its header promises."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            fits = 2 <= length <= min(_LARGEST_HEADER, size - 8)
            raw = stream.read(length) if fits else b""
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if not fits:
        raise InputError(f"{file} is not a safetensors file, or it is cut short: get it again")
    try:
        header = json.loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        infos = {name: _info(entry) for name, entry in header.items()}
        ranges = sorted(entry["data_offsets"] for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"the header of {file} cannot be read: get the file again") from None
    end = 0
    for begin, after in ranges:
        if begin != end:
            raise InputError(f"the tensors of {file} overlap or leave gaps: get the file again")
        end = after
    if end != size - 8 - length:
        raise InputError(
            f"{file} has {size} bytes where its header promises {8 + length + end}: "
            "it is cut short or damaged, get it again"
        )
    return infos


def _info(entry: dict) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("not a size")
    if math.prod(shape) * _ITEM_BYTES[entry["dtype"]] != end - begin:
        raise ValueError("a shape that is not its bytes")
    return TensorInfo(entry["dtype"], shape)
