"""Memory that is given out as arrays, and given out again when nobody holds them any longer.

Fresh memory costs more than reading into it: the system has to clear every page. A batch is its
holder's for as long as they like; the array's end, and that of all tensors made of it, is noticed.
"""

import weakref

import numpy as np


class Memory:
    """Blocks of bytes to use again."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, rows: int, columns: int) -> np.ndarray:
        """Bytes `[rows, columns]`, with anything in them."""
        size = rows * columns
        free = self._free.setdefault(size, [])
        block = free.pop() if free else np.empty(size, np.uint8)
        # An array of its own, whose end says nothing of the block's. A tensor made of it holds it;
        # another numpy view of it would hold the block alone.
        made = block.reshape(rows, columns)
        weakref.finalize(made, free.append, block).atexit = False
        return made
