"""The code of a batch: which features fire on each token, and how strongly."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseFeatures:
    """Feature activations of a batch of tokens in CSR form.

    Token `t` has the features `indices[offsets[t]:offsets[t + 1]]`, ascending, with the float32
    `values` at the same places. Everything not listed is 0.
    """

    offsets: Int[Tensor, " n_tokens_1"]
    indices: Int32[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    d_sae: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.offsets.numel() - 1

    @property
    def counts(self) -> Int[Tensor, " n_tokens"]:
        """Number of features that fire on each token."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The token of each entry."""
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.counts, output_size=self.indices.numel())

    def dense(self) -> Float[Tensor, "n_tokens d_sae"]:
        """The same as a matrix. Its size is `n_tokens * d_sae`: for tests and small batches."""
        out = self.values.new_zeros(self.n_tokens, self.d_sae)
        out[self.rows, self.indices.long()] = self.values
        return out

    def to(self, device: torch.device | str) -> "SparseFeatures":
        """The same on another device."""
        return SparseFeatures(
            self.offsets.to(device), self.indices.to(device), self.values.to(device), self.d_sae
        )

    def tokens(self, start: int, stop: int) -> "SparseFeatures":
        """The tokens `start` to `stop`."""
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return SparseFeatures(
            offsets - first, self.indices[first:last], self.values[first:last], self.d_sae
        )

    def top(self, count: int) -> list[list[tuple[int, float]]]:
        """For each token the `count` strongest features, as `(feature, value)`, strongest first.

        Equal values come in the order of their features.
        """
        ends = self.offsets.tolist()
        indices, values = self.indices.tolist(), self.values.tolist()
        out = []
        for start, stop in pairwise(ends):
            pairs = list(zip(indices[start:stop], values[start:stop], strict=True))
            out.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])
        return out

    @staticmethod
    def from_entries(
        rows: Int[Tensor, " nnz"],
        columns: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        n_tokens: int,
        d_sae: int,
    ) -> "SparseFeatures":
        """From entries sorted by row, then by column."""
        offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=n_tokens), 0, out=offsets[1:])
        return SparseFeatures(offsets, columns.int(), values.float(), d_sae)

    @staticmethod
    def from_dense(matrix: Float[Tensor, "n_tokens d_sae"]) -> "SparseFeatures":
        """The non-zero entries of `matrix`."""
        rows, columns = matrix.nonzero(as_tuple=True)
        return SparseFeatures.from_entries(rows, columns, matrix[rows, columns], *matrix.shape)

    @staticmethod
    def join(parts: Sequence["SparseFeatures"]) -> "SparseFeatures":
        """The tokens of all `parts`, in order; at least one part."""
        counts = torch.cat([p.counts for p in parts])
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return SparseFeatures(
            offsets,
            torch.cat([p.indices for p in parts]),
            torch.cat([p.values for p in parts]),
            parts[0].d_sae,
        )
