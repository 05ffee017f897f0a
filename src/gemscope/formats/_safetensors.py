"""Headers of safetensors files, read and checked without loading anything.

A safetensors file is: the length of the header (8 bytes, little-endian), the header (JSON: name to
dtype, shape and byte range), the bytes. Nothing here imports torch, so that listing is fast.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.errors import InputError

from ._facts import size_of

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
               "U8": 1, "BOOL": 1}  # fmt: skip
_LARGEST_HEADER = 4 * 2**20  # of a dictionary it is a few hundred bytes
_LARGEST_SIZE = 2**63
_LONGEST_NAME = 200
_MOST_AXES = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file`, after checking that the file holds the bytes its header promises."""
    size = size_of(file)
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            fits = 2 <= length <= min(_LARGEST_HEADER, size - 8)
            raw = stream.read(length) if fits else b""
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    if not fits:
        raise InputError(f"{file} is not a safetensors file, or it is cut short: get it again")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        infos = {_name(name): _info(entry) for name, entry in header.items()}
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; which of two values of one name counts is not said anywhere."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name that is there twice")
    return made


def _name(name: str) -> str:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError("not a name that a sentence can hold")
    return name


def _info(entry: dict) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    sizes = (begin, end, *shape)
    # Bounded before they are multiplied: the product of long numbers takes for ever.
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in sizes):
        raise ValueError("not a size")
    if math.prod(shape) * _ITEM_BYTES[entry["dtype"]] != end - begin:
        raise ValueError("a shape that is not its bytes")
    return TensorInfo(entry["dtype"], shape)
