"""The tokens of the call of the model under way: of a text at once, or of a step."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.corpus import TokenBatch


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that a placed edit is given, row by row, without padding."""

    rows: Int[Tensor, " n_tokens"]
    """Row of the batch."""
    positions: Int[Tensor, " n_tokens"]
    """Place in the row; BOS has 0."""
    ordinary: Bool[Tensor, " n_tokens"]
    """False at BOS, EOS, a chat's prefix and every other special token."""
    prompt_lengths: Int[Tensor, " batch"]
    """Tokens of each row that were given and not generated, BOS included."""

    @property
    def steps(self) -> Int[Tensor, " n_tokens"]:
        """0 for the first generated token, 1 for the next; negative in the prompt."""
        return self.positions - self.prompt_lengths[self.rows]


def row_lengths(batch: TokenBatch, pad: int) -> Int[Tensor, " batch"]:
    """Tokens of each row, which padding follows: up to the last that is something else."""
    there = (batch.ids != pad) | batch.counts
    return (there * torch.arange(1, batch.ids.shape[1] + 1)).amax(1)


class Frame:
    """The place of one call of the model in a batch that it is given in one or several calls.

    Rows begin after `pads[row]` tokens of padding and, in their first call, end at `ends[row]`;
    `ordinary` says which of the first call's tokens count, and later ones do unless special.
    """

    def __init__(
        self,
        ordinary: Bool[Tensor, "batch seq"],
        *,
        pads: Int[Tensor, " batch"],
        ends: Int[Tensor, " batch"],
        prompt_lengths: Int[Tensor, " batch"],
        specials: Int[Tensor, " n_specials"],
    ):
        self._first, self._pads, self._ends = ordinary, pads, ends
        self._prompts, self._specials = prompt_lengths, specials
        # Without any, which is the common case, nothing needs to be gathered.
        self._padded = bool((pads > 0).any()) or bool((ends < ordinary.shape[1]).any())
        self._rows = torch.arange(len(pads), device=pads.device)
        self._seen = 0
        self._places: Tensor | None = None
        self.counts = ordinary
        """Which tokens of the call under way count."""
        self.tokens: Tokens | None = None
        """The same call's tokens without padding; None before any call."""

    def begin(self, ids: Int[Tensor, "batch seq"]) -> None:
        """Another call of the model, on the next `ids` of every row."""
        n_rows, n = ids.shape
        if self._seen and n == 1:
            self._step(ids)
            return
        column = torch.arange(self._seen, self._seen + n, device=ids.device)
        self.counts, self._places = self._first, None
        if self._seen:
            self.counts = ~torch.isin(ids, self._specials)
        elif self._padded:
            real = (column >= self._pads[:, None]) & (column < self._ends[:, None])
            self._places = real.flatten().nonzero().flatten()
        row = torch.arange(n_rows, device=ids.device).repeat_interleave(n)
        positions, ordinary = column.repeat(n_rows), self.counts.flatten()
        if self._places is not None:
            row, positions = row[self._places], positions[self._places]
            ordinary = ordinary[self._places]
        self.tokens = Tokens(
            rows=row, positions=positions - self._pads[row], ordinary=ordinary,
            prompt_lengths=self._prompts,
        )  # fmt: skip
        self._seen += n

    def _step(self, ids: Tensor) -> None:
        """One more token of every row, in as few operations as there can be."""
        self._places, self.counts = None, (ids != self._specials).all(1, keepdim=True)
        self.tokens = Tokens(
            rows=self._rows, positions=self._seen - self._pads, ordinary=self.counts[:, 0],
            prompt_lengths=self._prompts,
        )  # fmt: skip
        self._seen += 1

    def gather(
        self, value: Float[Tensor, "batch seq d"], *, placed: bool
    ) -> Float[Tensor, "n_tokens d"]:
        """Of `value` `[batch, seq, d]`, the rows `[n_tokens, d]` of all tokens or those counted."""
        if not placed:
            return value[self.counts]
        flat = value.reshape(-1, value.shape[-1])
        return flat if self._places is None else flat[self._places]

    def put(
        self, value: Float[Tensor, "batch seq d"], new: Float[Tensor, "n_tokens d"], *, placed: bool
    ) -> Float[Tensor, "batch seq d"]:
        """`value` with `new` in the place of what `gather` took, in the type of `value`."""
        new = new.to(value.dtype)
        if placed and self._places is None:
            return new.reshape(value.shape)
        out = value.clone()
        if placed:
            out.reshape(-1, value.shape[-1])[self._places] = new
        else:
            out[self.counts] = new
        return out
