"""How often features fire, document by document: what comparing texts and their tests rest on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gemscope.errors import InputError
from gemscope.features import Activations, Text

_CELLS = 2**22
"""Of a block of features by documents, held at once."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Firings of every feature in a group of documents, as sums over those documents.

    With `k` the firings and `n` the counted tokens of a document: everything a test over
    documents needs, in memory of the size of the dictionary.
    """

    name: str
    documents: int
    """Those that have tokens that count."""
    tokens: int
    squared_tokens: float
    """Sum of `n * n`."""
    inflation: float
    """What a sum of squared residuals is multiplied by: see `unequal`."""
    freedom: float
    """Degrees of freedom of that sum."""
    fired: Int[np.ndarray, " d_sae"]
    """Sum of `k`."""
    squares: Float[np.ndarray, " d_sae"]
    """Sum of `k * k`."""
    products: Float[np.ndarray, " d_sae"]
    """Sum of `k * n`."""
    documents_fired: Int[np.ndarray, " d_sae"]
    """Documents with `k > 0`."""

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the counted tokens that a feature fires on."""
        return self.fired / max(self.tokens, 1)


def document_counts(
    activations: Activations, address: str
) -> Iterator[tuple[int, Int[np.ndarray, "n_features n_documents"]]]:
    """Firings by feature and document, a block of features at a time, with its first feature."""
    text, d_sae = activations.text, activations.d_sae(address)
    n = len(text.paths)
    step = max(1, _CELLS // n)
    for first in range(0, d_sae, step):
        stop = min(first + step, d_sae)
        found = activations.entries(address, first, stop)
        cells = found.features * n + text.document_of(found.places)
        counts = np.bincount(cells, minlength=(stop - first) * n)
        yield first, counts.reshape(stop - first, n)


def document_tokens(text: Text) -> Int[np.ndarray, " n_documents"]:
    """Counted tokens of every document."""
    places = np.flatnonzero(text.counts)
    return np.bincount(text.document_of(places), minlength=len(text.paths))


def group_counts(
    activations: Activations, address: str, groups: Sequence[tuple[str, np.ndarray]]
) -> list[GroupCounts]:
    """The sums of each group `(name, numbers of its documents)`, in one pass over the features."""
    tokens = document_tokens(activations.text)
    chosen = [(name, rows[tokens[rows] > 0]) for name, rows in groups]
    for name, rows in chosen:
        if len(rows) < 2:
            raise InputError(
                f"{name} gave {len(rows)} document{'' if len(rows) == 1 else 's'}: documents are "
                "what is compared, so each side needs 2 or more; give more files, or more --tokens"
            )
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in chosen]
    for _, counts in document_counts(activations, address):
        for part, (_, rows) in zip(parts, chosen, strict=True):
            k, n = counts[:, rows], tokens[rows]
            exact = k.astype(np.float64)
            part.append((k.sum(1), (exact**2).sum(1), exact @ n, (k > 0).sum(1)))
    return [
        GroupCounts(
            name,
            len(rows),
            int(tokens[rows].sum()),
            float((tokens[rows].astype(np.float64) ** 2).sum()),
            *unequal(tokens[rows]),
            *(np.concatenate(column) for column in zip(*part, strict=True)),
        )
        for (name, rows), part in zip(chosen, parts, strict=True)
    ]


def unequal(tokens: Int[np.ndarray, " m"]) -> tuple[float, float]:
    """What makes a sum of squared residuals unbiased, and its degrees of freedom.

    The first for documents whose firings have a standard deviation in proportion to their length,
    as they do where densities differ from document to document; the second is one less Kish's
    effective number of documents. Of `m` equally long ones they are `m / (m - 1)` and `m - 1`; a
    few long ones among short ones count for fewer.
    """
    n = tokens.astype(np.float64)
    share, squares = n / n.sum(), n**2
    kept = 1 - 2 * (share * squares).sum() / squares.sum() + (share**2).sum()
    freedom = 1 / (share**2).sum() - 1
    # One document that is all but everything would leave nothing: the largest factor is that of
    # two documents, and a t with fewer than one degree of freedom has no use.
    return float(1 / max(kept, 0.5)), float(max(freedom, 1.0))


def source_documents(text: Text, name: str) -> Int[np.ndarray, " n"]:
    """Numbers of the documents of a source."""
    if name not in text.sources:
        raise InputError(f"no source {name!r} in this text: it has {', '.join(text.sources)}")
    return np.flatnonzero(text.source == text.sources.index(name))
