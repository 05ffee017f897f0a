"""Control vectors in GGUF, as llama.cpp and repeng read and write them.

A file is: `GGUF`, version, counts of tensors and of keys, the keys, a line on each tensor, and the
tensors, each on a multiple of the alignment. A control vector says `general.architecture =
controlvector` and holds `direction.N`, float32 and of the model's width, which is added to what
decoder layer N gives out, layers counted from 0. llama.cpp has no room for layer 0 and refuses
`direction.0`. Sources: `docs/gguf.md` of ggml, `llama-adapter.cpp` and `common.cpp` of llama.cpp,
`extract.py` of repeng.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError

LARGEST = 256 * 2**20
"""Bytes of a vector file, at most: a hundred layers of width 16,384 take 7 MB."""
_ARCHITECTURE = "controlvector"
_VERSION, _ALIGNMENT, _MOST = 3, 32, 100_000
_UINT32, _STRING, _ARRAY, _FLOAT32 = 4, 8, 9, 0
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, for all types but strings and arrays."""


def gguf_bytes(
    layers: Mapping[int, Float[Tensor, " d"]], *, hint: str, notes: Mapping[str, object]
) -> bytes:
    """The file that adds each vector to what its layer gives out.

    `hint` says what kind of model it is for; `notes` are written as `gemscope.NAME` in JSON.
    """
    keys: list[tuple[str, str | int]] = [
        ("general.architecture", _ARCHITECTURE),
        (f"{_ARCHITECTURE}.model_hint", hint),
        (f"{_ARCHITECTURE}.layer_count", len(layers)),
        *((f"gemscope.{name}", json.dumps(value)) for name, value in notes.items()),
    ]
    head = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(layers), len(keys))]
    for key, value in keys:
        plain = isinstance(value, int)
        head.append(_string(key) + struct.pack("<I", _UINT32 if plain else _STRING))
        head.append(struct.pack("<I", value) if isinstance(value, int) else _string(value))
    data: list[bytes] = []
    for layer in sorted(layers):
        vector = layers[layer].detach().cpu().float()
        head.append(_string(f"direction.{layer}"))
        head.append(struct.pack("<IQIQ", 1, len(vector), _FLOAT32, sum(map(len, data))))
        data.append(_padded(vector.numpy().astype("<f4").tobytes()))
    return _padded(b"".join(head)) + b"".join(data)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(raw: bytes) -> bytes:
    return raw + b"\0" * (-len(raw) % _ALIGNMENT)


def read_gguf(file: Path, raw: bytes) -> dict[int, Float[Tensor, " d"]]:
    """The vectors of the bytes of `file`, by layer; nothing in them is believed unchecked."""
    reader = _Reader(file, raw)
    if reader.take(4) != b"GGUF":
        raise InputError(f"{file} is not a GGUF file: give a control vector, .gguf or .safetensors")
    if (version := reader.number("I")) not in (2, 3):
        raise InputError(
            f"{file} is GGUF version {version}; versions 2 and 3 are read, little-endian"
        )
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    if max(n_tensors, n_keys) > _MOST:
        raise reader.damaged()
    keys = [reader.key() for _ in range(n_keys)]
    known = dict(keys)
    if len(known) != n_keys:
        raise reader.damaged()
    if (found := known.get("general.architecture")) != _ARCHITECTURE:
        what = f"holds {found!r}" if isinstance(found, str) else "does not say what it holds"
        raise InputError(
            f"{file} {what}, not a control vector: its general.architecture must be {_ARCHITECTURE}"
        )
    alignment = known.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 65_536:
        raise reader.damaged()
    infos = [reader.tensor() for _ in range(n_tensors)]
    base = -(-reader.at // alignment) * alignment
    return _directions(reader, infos, base)


@dataclass(frozen=True, slots=True)
class _Info:
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _directions(reader: "_Reader", infos: list[_Info], base: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for info in infos:
        match = re.fullmatch(r"direction\.(\d{1,4})", info.name)
        if match is None:
            raise InputError(
                f"{reader.file} has a tensor {info.name!r}; those of a control vector are called "
                "direction.LAYER"
            )
        if info.kind != _FLOAT32 or len(info.shape) != 1 or not info.shape[0]:
            raise InputError(
                f"{info.name} of {reader.file} is not one row of float32 numbers, which is what a "
                "control vector holds: write it anew as float32"
            )
        layer, begin = int(match[1]), base + info.offset
        end = begin + 4 * info.shape[0]
        if layer in found or end > len(reader.raw):
            raise reader.damaged()
        # A copy: the tensor must not keep the whole file in memory.
        found[layer] = torch.frombuffer(bytearray(reader.raw[begin:end]), dtype=torch.float32)
    if len({len(vector) for vector in found.values()}) > 1:
        raise InputError(f"the directions of {reader.file} are not of one width: get it again")
    return dict(sorted(found.items()))


class _Reader:
    """Numbers and strings one after the other, none of them beyond the end."""

    def __init__(self, file: Path, raw: bytes):
        self.file, self.raw, self.at = file, raw, 0

    def damaged(self) -> InputError:
        """What is said of a file that contradicts itself."""
        return InputError(f"{self.file} is cut short or damaged: get the file again")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.raw) - self.at:
            raise self.damaged()
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, kind: str) -> int:
        """The next number, of a type that `struct` calls `kind`."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return value

    def string(self) -> str:
        """The next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.damaged() from None

    def key(self) -> tuple[str, str | int | None]:
        """The next key and its value, None for what is of no use here."""
        name, kind = self.string(), self.number("I")
        if kind == _STRING:
            return name, self.string()
        if kind == _UINT32:
            return name, self.number("I")
        self._skip(kind)
        return name, None

    def _skip(self, kind: int) -> None:
        if kind in _SIZES:
            self.take(_SIZES[kind])
            return
        if kind != _ARRAY:
            raise self.damaged()
        inner, count = self.number("I"), self.number("Q")
        if inner in _SIZES:
            self.take(_SIZES[inner] * count)
        elif inner == _STRING and 8 * count <= len(self.raw) - self.at:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise self.damaged()

    def tensor(self) -> _Info:
        """What is said of the next tensor."""
        name, axes = self.string(), self.number("I")
        if axes > 4:
            raise self.damaged()
        shape = tuple(self.number("Q") for _ in range(axes))
        return _Info(name, shape, self.number("I"), self.number("Q"))
