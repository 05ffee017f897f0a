"""Activations as rows of bytes, in the type they are stored in.

`float32` and `bfloat16` rows are the numbers, little-endian. An `int8` row is `d` signed bytes `q`
and a float32 scale `s`, the token's own: `s = max|x| / 127`, `q = round(x / s)`. So `q * s` is
within `max|x| / 254` of `x`, and a few float32 roundings.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
NAMES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
"""What safetensors calls them."""
_SCALE_BYTES = 4


def columns(dtype: str, width: int) -> int:
    """Columns of a stored row: the width, and of `int8` the bytes of the scale too."""
    return width + _SCALE_BYTES if dtype == "int8" else width


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of a stored row."""
    return columns(dtype, width) * DTYPES[dtype].itemsize


def encode(values: Float[Tensor, "n d"], dtype: str) -> UInt8[Tensor, "n bytes"]:
    """`values` as rows of bytes, where they are."""
    if dtype != "int8":
        return values.to(DTYPES[dtype]).contiguous().view(torch.uint8)
    x = values.float()
    scale = x.abs().amax(1, keepdim=True) / 127
    # Where all is zero, so is the scale, and anything may stand in its place.
    q = (x / scale.where(scale > 0, 1.0)).round().clamp(-127, 127)
    return torch.cat([q.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1)


def decode(
    rows: UInt8[Tensor, "n bytes"], dtype: str, out: torch.dtype | None = None
) -> Float[Tensor, "n d"]:
    """What `encode` has made rows of, as `out`; left out: as stored, and `int8` as float32."""
    if dtype != "int8":
        return rows.view(DTYPES[dtype]).to(out or DTYPES[dtype])
    scale = rows[:, -_SCALE_BYTES:].contiguous().view(torch.float32)
    values = rows[:, :-_SCALE_BYTES].view(torch.int8).float().mul_(scale)
    return values.to(out or torch.float32)
