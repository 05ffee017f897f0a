"""The text of an index: tokens of many contexts, one after the other, and where each came from."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from gemscope.corpus import Context, Document, Prefix, TokenBatch, contexts
from gemscope.errors import InputError

_POOL, _DOCUMENTS = 4, 32
"""So many times the tokens wanted, of so many documents, are looked through for what to take."""


@dataclass(frozen=True, slots=True)
class Source:
    """A named part of the text, whose densities are kept apart."""

    name: str
    documents: list[Document]


@dataclass(frozen=True)
class Text:
    """Contexts, all their tokens one after the other; a place is an index into `ids`."""

    ids: np.ndarray
    """int32 `[n_places]`; the BOS of each context included, no padding."""
    counts: np.ndarray
    """bool `[n_places]`: tokens that count in statistics."""
    offsets: np.ndarray
    """int64 `[n_contexts + 1]`: context `c` has the places `offsets[c]` to `offsets[c + 1]`."""
    document: np.ndarray
    """int32 `[n_contexts]`, ascending."""
    start: np.ndarray
    """int32 `[n_contexts]`: place in its document's tokens of a context's first own token."""
    paths: list[str]
    """Of each document."""
    sources: list[str]
    source: np.ndarray
    """int32 `[n_documents]`: the source of each document."""

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        return len(self.document)

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.counts.sum())

    @cached_property
    def tokens_of_sources(self) -> np.ndarray:
        """Tokens of each source that count, int64 `[n_sources]`."""
        places = np.flatnonzero(self.counts)
        return np.bincount(self.source[self.document_of(places)], minlength=len(self.sources))

    @cached_property
    def context(self) -> np.ndarray:
        """The context of every place, int32 `[n_places]`."""
        return np.repeat(np.arange(self.n_contexts, dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def position(self) -> np.ndarray:
        """Where in its context every place is, int32 `[n_places]`; BOS is at 0."""
        return (np.arange(len(self.ids)) - self.offsets[self.context]).astype(np.int32)

    def context_of(self, places: np.ndarray) -> np.ndarray:
        """The context of each of `places`."""
        return self.context[places]

    def document_of(self, places: np.ndarray) -> np.ndarray:
        """The document of each of `places`."""
        return self.document[self.context[places]]

    def batch(self, first: int, stop: int, pad: int) -> TokenBatch:
        """The contexts `first` to `stop`, padded on the right."""
        widths = np.diff(self.offsets[first : stop + 1])
        ids = torch.full((stop - first, int(widths.max())), pad)
        counts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, context in enumerate(range(first, stop)):
            here = slice(int(self.offsets[context]), int(self.offsets[context + 1]))
            ids[row, : widths[row]] = torch.from_numpy(self.ids[here].astype(np.int64))
            counts[row, : widths[row]] = torch.from_numpy(self.counts[here])
        return TokenBatch(
            ids,
            counts,
            torch.from_numpy(self.document[first:stop].astype(np.int64)),
            torch.from_numpy(self.start[first:stop].astype(np.int64)),
        )

    @cached_property
    def key(self) -> str:
        """SHA-256 of tokens, what counts and where it is from, in hexadecimal."""
        found = hashlib.sha256()
        for part in (self.ids, self.counts, self.offsets, self.document, self.start, self.source):
            found.update(np.ascontiguousarray(part).tobytes())
        found.update("\0".join([*self.paths, *self.sources]).encode())
        return found.hexdigest()


def sample_text(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    tokens: int | None,
    context: int,
    prefix: Prefix | None = None,
    seed: int = 0,
) -> Text:
    """Up to `tokens` counted tokens of `sources`, evenly, in contexts of at most `context` tokens.

    Which contexts are taken is decided by a hash of where they are, so a text that is longer than
    what is wanted is seen in many places and not in its first ones alone. The last context counts
    just as many tokens as are still wanted.
    """
    if not sources or not any(source.documents for source in sources):
        raise InputError("the text is empty; give one with words in it")
    if tokens is not None and tokens < 1:
        raise InputError(f"{tokens} tokens are none; take 1 or more")
    pools = [_pool(s, tokenizer, tokens, context, seed) for s in sources]
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    left, chosen = tokens, []
    # The shortest source first: what it lacks is left to the others.
    order = sorted(range(len(sources)), key=lambda i: sum(len(c.ids) for _, c in pools[i]))
    for rank, place in enumerate(order):
        share = None if left is None else -(-left // (len(order) - rank))
        rows, used = _take(pools[place], special, prefix, share, tokenizer.bos_token_id)
        chosen += [(place, key, row, counts) for key, row, counts in rows]
        left = None if left is None else left - used
    if not chosen:
        raise InputError("the text holds no token that counts (special tokens do not)")
    return _assembled(sources, chosen)


def _pool(
    source: Source, tokenizer: Any, tokens: int | None, context: int, seed: int
) -> list[tuple[int, Context]]:
    """Contexts of some documents of a source, with the number of their document in it."""
    order = sorted(
        range(len(source.documents)), key=lambda i: _hash(seed, source.documents[i].path, 0)
    )
    found, have = [], 0
    for seen, place in enumerate(order, start=1):
        for one in contexts([source.documents[place]], tokenizer, length=context):
            found.append((place, one))
            have += len(one.ids)
        if tokens is not None and have >= _POOL * tokens and seen >= _DOCUMENTS:
            break
    return sorted(
        found, key=lambda pair: _hash(seed, source.documents[pair[0]].path, 1 + pair[1].start)
    )


def _hash(seed: int, path: str, place: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}\0{place}".encode()).digest()


def _take(
    pool: Iterable[tuple[int, Context]],
    special: np.ndarray,
    prefix: Prefix | None,
    limit: int | None,
    bos: int | None,
) -> tuple[list[tuple[int, Context, np.ndarray]], int]:
    """The first contexts of `pool` with `limit` counted tokens in all, and how many those are."""
    taken, used = [], 0
    for place, row in pool:
        if limit is not None and used >= limit:
            break
        ids = np.array(row.ids, dtype=np.int64)
        counts = ~np.isin(ids, special)
        if prefix is not None:
            counts &= ~_prefixed(ids, prefix, bos)
        if limit is not None:
            counts &= np.cumsum(counts) <= limit - used
        if n := int(counts.sum()):
            taken.append((place, row, counts))
            used += n
    return taken, used


def _prefixed(ids: np.ndarray, prefix: Prefix, bos: int | None) -> np.ndarray:
    """True at the tokens that begin a user's turn in a chat."""
    out, length = np.zeros(len(ids), dtype=bool), len(prefix.ids)
    if len(ids) < length:
        return out
    windows = np.lib.stride_tricks.sliding_window_view(ids, length)
    for begin in np.flatnonzero((windows == np.array(prefix.ids)).all(1)):
        if prefix.every_turn or begin == (0 if bos is None else 1):
            out[begin : begin + length] = True
    return out


def _assembled(
    sources: Sequence[Source], chosen: list[tuple[int, int, Context, np.ndarray]]
) -> Text:
    chosen.sort(key=lambda c: (c[0], c[1], c[2].start))
    numbers: dict[tuple[int, int], int] = {}
    for source, document, _, _ in chosen:
        numbers.setdefault((source, document), len(numbers))
    lengths = [len(row.ids) for _, _, row, _ in chosen]
    return Text(
        ids=np.concatenate([np.array(row.ids, dtype=np.int32) for _, _, row, _ in chosen]),
        counts=np.concatenate([counts for _, _, _, counts in chosen]),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        document=np.array([numbers[s, d] for s, d, _, _ in chosen], dtype=np.int32),
        start=np.array([row.start for _, _, row, _ in chosen], dtype=np.int32),
        paths=[sources[s].documents[d].path for s, d in numbers],
        sources=[source.name for source in sources],
        source=np.array([s for s, _ in numbers], dtype=np.int32),
    )
