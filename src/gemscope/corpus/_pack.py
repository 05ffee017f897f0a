"""Documents to batches of tokens.

Every context begins with BOS and holds tokens of one document only, so nothing is read across a
border. Long documents are cut into several contexts; short contexts are padded on the right, where
a causal model cannot see it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gemscope.errors import InputError
from gemscope.miniature import Document


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Contexts of tokens, and which of the tokens count in statistics."""

    ids: Int[Tensor, "batch seq"]
    counts: Bool[Tensor, "batch seq"]
    """False at BOS, EOS, padding and every other special token."""
    documents: Int[Tensor, " batch"]
    """Index of the document of each context."""
    starts: Int[Tensor, " batch"]
    """Place, in its document's tokens, of each context's first own token."""

    @property
    def n_counted(self) -> int:
        """Number of tokens that count."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that begin a user's turn in a chat: outliers, left out of every statistic."""

    ids: tuple[int, ...]
    every_turn: bool
    """Whether wherever they stand, or only right after BOS."""


@dataclass(frozen=True, slots=True)
class Context:
    """One row of a batch, before padding."""

    ids: list[int]
    document: int
    start: int


def contexts(documents: Iterable[Document], tokenizer: Any, *, length: int) -> Iterator[Context]:
    """The documents as contexts of at most `length` tokens, BOS included, in order."""
    if length < 2:
        raise InputError(f"a context of {length} tokens has no room after BOS; take 2 or more")
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    room = length - len(first)
    for index, document in enumerate(documents):
        try:
            document.text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the text of {document.path!r} is not valid Unicode") from None
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        # A chat template has written BOS already.
        begin = 1 if first and ids[:1] == first else 0
        for start in range(begin, len(ids), room):
            yield Context(first + ids[start : start + room], index, start)


def pack(
    rows: Iterable[Context],
    tokenizer: Any,
    *,
    batch: int,
    tokens: int | None = None,
    prefix: Prefix | None = None,
) -> Iterator[TokenBatch]:
    """Contexts as batches of `batch` rows, up to `tokens` counted tokens in all.

    The last batch counts just as many tokens as are still wanted. Tokens of `prefix` do not count.
    """
    left, held = tokens, []
    for row in rows:
        held.append(row)
        if len(held) == batch:
            made = _batch(held, tokenizer, left, prefix)
            held = []
            yield made
            if left is not None and (left := left - made.n_counted) <= 0:
                return
    if held:
        yield _batch(held, tokenizer, left, prefix)


def _batch(
    rows: list[Context], tokenizer: Any, limit: int | None, prefix: Prefix | None
) -> TokenBatch:
    width = max(len(row.ids) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), width), pad)
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        counts[place, : len(row.ids)] = True
    counts &= ~torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids)))
    if prefix is not None:
        counts &= ~_prefixed(ids, prefix, bos=tokenizer.bos_token_id)
    if limit is not None:
        counts &= (counts.flatten().cumsum(0) <= limit).reshape(counts.shape)
        used = max([1, *(counts.any(1).nonzero().flatten() + 1).tolist()])
        rows, ids, counts = rows[:used], ids[:used], counts[:used]
    return TokenBatch(
        ids,
        counts,
        torch.tensor([row.document for row in rows]),
        torch.tensor([row.start for row in rows]),
    )


def _prefixed(ids: Tensor, prefix: Prefix, *, bos: int | None) -> Tensor:
    """True at the tokens of `prefix`."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    length = len(prefix.ids)
    if ids.shape[1] < length:
        return out
    begins = (ids.unfold(1, length, 1) == torch.tensor(prefix.ids)).all(2)
    if not prefix.every_turn:
        first = torch.zeros_like(begins)
        place = 0 if bos is None else 1
        first[:, place : place + 1] = True
        begins &= first
    for shift in range(length):
        out[:, shift : shift + begins.shape[1]] |= begins
    return out
