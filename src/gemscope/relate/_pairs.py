"""Firing of pairs of features, of one dictionary or of two on the same text, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gemscope.errors import InputError
from gemscope.features import Activations, Store, pair_counts
from gemscope.sites import Site, Stream, each, parse_sites

_CELLS = 2**22
"""Of a block of pairs, held at once in a few arrays of float64."""
_SHARED = {
    Stream.RESID_PRE, Stream.RESID_MID, Stream.RESID_POST, Stream.ATTN_OUT, Stream.MLP_OUT,
    Stream.EMBED,
}  # fmt: skip
"""Streams whose vectors are added to the residual stream or are it: one space in all layers."""


@dataclass(frozen=True)
class Indexed:
    """A dictionary, what it writes and where it fires."""

    address: str
    writes: tuple[Site, ...]
    activations: Activations
    vectors: Float[np.ndarray, "d_sae d_out"]
    """Decoder rows."""
    fired: Int[np.ndarray, " d_sae"]
    """Tokens each feature fires on."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.fired)

    @property
    def tokens(self) -> int:
        """Tokens of the text that count."""
        return self.activations.text.n_tokens

    @property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Features that fire on the text."""
        return self.fired > 0


@dataclass(frozen=True)
class Pairs:
    """A block of features against all of a dictionary: counts and what follows from them."""

    first: int
    """The first feature of the block."""
    both: Int[np.ndarray, "n m"]
    """Tokens on which both fire."""
    a: Int[np.ndarray, " n"]
    b: Int[np.ndarray, " m"]
    """Tokens each fires on."""
    tokens: int

    @property
    def stop(self) -> int:
        """One after the last feature of the block."""
        return self.first + len(self.a)

    @property
    def phi(self) -> Float[np.ndarray, "n m"]:
        """Correlation of firing; 0 where a feature fires on no token, or on all."""
        n, a, b = float(self.tokens), self.a[:, None].astype(float), self.b[None].astype(float)
        spread = np.sqrt(a * (n - a)) * np.sqrt(b * (n - b))
        excess = self.both * n - a * b
        return np.divide(excess, spread, out=np.zeros(self.both.shape), where=spread > 0)

    @property
    def b_given_a(self) -> Float[np.ndarray, "n m"]:
        """Share of the tokens of the block's feature on which the other fires too."""
        return self.both / np.maximum(self.a, 1)[:, None]

    @property
    def a_given_b(self) -> Float[np.ndarray, "n m"]:
        """Share of the other's tokens on which the block's feature fires too."""
        return self.both / np.maximum(self.b, 1)[None]

    @property
    def jaccard(self) -> Float[np.ndarray, "n m"]:
        """Tokens on which both fire as a share of those on which either does."""
        either = self.a[:, None] + self.b[None] - self.both
        return self.both / np.maximum(either, 1)


def indexed(activations: Activations, address: str, vectors: np.ndarray, writes: str) -> Indexed:
    """A dictionary of `activations`, given its decoder rows and where it writes."""
    fired = np.zeros(activations.d_sae(address), dtype=np.int64)
    for _, _, code in activations.codes(address):
        fired += np.diff(code.indptr)
    if len(vectors) != len(fired):
        raise InputError(f"{len(vectors)} decoder rows for the {len(fired)} features of {address}")
    return Indexed(address, each(parse_sites(writes)), activations, vectors, fired)


def from_store(store: Store, address: str) -> Indexed:
    """A dictionary of a store that kept its activations."""
    known = store.dictionary(address)
    found = store.activations(address)
    if found is None:
        raise InputError(
            f"the activations of {address} were not kept, and relations are counted on them; "
            f"gemscope index {address} --to {store.folder} --keep-activations keeps them"
        )
    return indexed(found, address, store.vectors(address), known["writes"])


def pairs(one: Indexed, other: Indexed | None = None) -> Iterator[Pairs]:
    """All pairs of features of one dictionary, or of two on the same text, in blocks."""
    beside = other or one
    for first, stop, both in _counts(one, beside):
        step = max(1, _CELLS // beside.d_sae)
        for low in range(first, stop, step):
            high = min(stop, low + step)
            yield Pairs(
                low, both[low - first : high - first], one.fired[low:high], beside.fired, one.tokens
            )


def _counts(one: Indexed, other: Indexed) -> Iterator[tuple[int, int, np.ndarray]]:
    if one.activations.folder == other.activations.folder:
        yield from pair_counts(one.activations, one.address, other.address)
        return
    if one.activations.text.key != other.activations.text.key:
        raise InputError(
            f"{one.address} and {other.address} were indexed on different texts; index both on "
            "one text, best in one command: gemscope index ADDRESS ADDRESS --to STORE "
            "--keep-activations"
        )
    # Indexed one by one, shards end in different places: the other's firings are held whole,
    # eight bytes each.
    theirs = firing(other.activations, other.address, 0, other.d_sae)
    step = max(1, 2**27 // other.d_sae)
    for first in range(0, one.d_sae, step):
        stop = min(one.d_sae, first + step)
        mine = firing(one.activations, one.address, first, stop)
        yield first, stop, (mine.T @ theirs).toarray()


def firing(activations: Activations, address: str, first: int, stop: int):
    """Where the features `first` to `stop` fire: a sparse matrix of ones `[n_places, n]`, int32."""
    from scipy.sparse import csc_array  # type: ignore[import-untyped]

    found = activations.entries(address, first, stop)
    ones = np.ones(len(found.places), dtype=np.int32)
    shape = (len(activations.text.ids), stop - first)
    return csc_array((ones, found.places, found.offsets), shape=shape)


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; rows of zeros stay so."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def check_space(one: Indexed, other: Indexed) -> None:
    """Refuse two dictionaries whose decoder rows are not vectors of one space."""
    streams = [{site.stream for site in side.writes} for side in (one, other)]
    shared = all(s <= _SHARED for s in streams)
    if one.vectors.shape[1] != other.vectors.shape[1] or not (shared or one.writes == other.writes):
        where = [",".join(map(str, side.writes)) for side in (one, other)]
        raise InputError(
            f"{one.address} writes {where[0]} and {other.address} writes {where[1]}: their "
            "directions are not of one space; take dictionaries that write the residual stream, "
            "or of one site"
        )


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson interval of a share of `k` among `n`; 0 to 1 where n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5)
    return max(0.0, middle - half), min(1.0, middle + half)
