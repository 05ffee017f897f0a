"""Memory for what is thrown away after every tile."""

import torch
from torch import Tensor


class Scratch:
    """Buffers by name, used again and again.

    Asked for anew for every tile, they break up the heap: what is freed is often a little too small
    for what is asked next, and a wide dictionary fills gigabytes with such gaps.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._held: dict[str, Tensor] = {}

    def __call__(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`[rows, columns]` of the buffer `name`, holding anything."""
        size, held = rows * columns, self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return held[:size].view(rows, columns)
