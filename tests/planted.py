"""Texts and activations made by hand, with what is in them known."""

import numpy as np
from scipy.sparse import csc_array

from gemscope.features import Text, write_activations
from gemscope.relate import GroupCounts, Indexed, indexed
from gemscope.relate._counts import unequal


def text_of(lengths, sources=None):
    """A text with one document, of one context, for each of `lengths` counted tokens."""
    lengths = np.asarray(lengths)
    n = len(lengths)
    sources = (
        np.zeros(n, dtype=np.int32) if sources is None else np.asarray(sources, dtype=np.int32)
    )
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)]).astype(np.int64)
    counts = np.ones(offsets[-1], dtype=bool)
    counts[offsets[:-1]] = False  # BOS
    return Text(
        ids=np.arange(offsets[-1], dtype=np.int32) % 97 + 5,
        counts=counts,
        offsets=offsets,
        document=np.arange(n, dtype=np.int32),
        start=np.zeros(n, dtype=np.int32),
        paths=[f"document {i}" for i in range(n)],
        sources=[f"source {i}" for i in range(int(sources.max()) + 1)],
        source=sources,
    )


def dense_code(text, firing):
    """Firing `[n_tokens, d_sae]` of the counted tokens as a code `[n_places, d_sae]`."""
    code = np.zeros((len(text.ids), firing.shape[1]), dtype=np.float32)
    code[text.counts] = firing
    return csc_array(code)


def planted(folder, firing, vectors, *, lengths=None, writes="3.resid_post"):
    """Dictionaries `name: firing [n_tokens, d_sae]` with decoder rows, on one text: `Indexed`s."""
    n = len(next(iter(firing.values())))
    text = text_of([n] if lengths is None else lengths)
    made = write_activations(folder, text, {k: dense_code(text, f) for k, f in firing.items()})
    where = writes if isinstance(writes, dict) else dict.fromkeys(firing, writes)
    return [indexed(made, name, vectors[name], where[name]) for name in firing]


def side(k, n, name="a") -> GroupCounts:
    """Sums over documents of firings `k [d_sae, m]` among `n [m]` tokens."""
    exact = k.astype(float)
    return GroupCounts(
        name, k.shape[1], int(n.sum()), float((n.astype(float) ** 2).sum()), *unequal(n),
        k.sum(1).astype(np.int64), (exact**2).sum(1), exact @ n, (k > 0).sum(1),
    )  # fmt: skip


def brute_counts(one: Indexed, other: Indexed):
    """Tokens in common of all pairs, by sets."""
    sets = [
        [set(x.activations.of(x.address, f)[0].tolist()) for f in range(x.d_sae)]
        for x in (one, other)
    ]
    return np.array([[len(a & b) for b in sets[1]] for a in sets[0]])
