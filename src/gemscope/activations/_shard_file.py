"""One shard of one site: a safetensors file whose every byte but the numbers is known beforehand.

Its tensors, in this order:

- `checksums`, U32 `[chunks]`: the checksum (`_checksum.py`) of each run of `chunk` rows;
- `activations`, `[tokens, d]` F32 or BF16; of an int8 store I8 `[tokens, d + 4]`, where the last
  four bytes of a row are its scale (`_records.py`).
"""

import json
from dataclasses import dataclass

from ._records import NAMES, columns, row_bytes


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The layout of a shard of `tokens` rows of activations that are `width` wide."""

    dtype: str
    width: int
    tokens: int
    chunk: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return row_bytes(self.dtype, self.width)

    @property
    def chunks(self) -> int:
        """Number of runs of rows that have a checksum of their own."""
        return -(-self.tokens // self.chunk)

    @property
    def header(self) -> bytes:
        """The file up to the first tensor, at a multiple of eight."""
        sums = 4 * self.chunks
        shape = [self.tokens, columns(self.dtype, self.width)]
        entries = {
            "checksums": {"dtype": "U32", "shape": [self.chunks], "data_offsets": [0, sums]},
            "activations": {
                "dtype": NAMES[self.dtype],
                "shape": shape,
                "data_offsets": [sums, sums + self.tokens * self.row_bytes],
            },
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def first_row(self) -> int:
        """Where in the file the activations begin."""
        return len(self.header) + 4 * self.chunks

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.first_row + self.tokens * self.row_bytes
