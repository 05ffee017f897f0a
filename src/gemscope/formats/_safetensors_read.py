"""Tensors of a safetensors file, mapped in their storage type."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gemscope.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def map_tensors(file: Path, names: Iterable[str]) -> dict[str, "Tensor"]:
    """`names` of `file`; the header has been read and checked before."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
