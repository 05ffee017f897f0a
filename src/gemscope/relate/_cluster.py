"""Features in groups: a tree over firing together or over directions, cut, and named."""

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from gemscope.errors import InputError
from gemscope.features import Store

from ._pairs import Indexed, from_store, pairs, unit
from ._tree import FULL, NEAREST, cut, full_tree, sparse_tree

On = Literal["together", "directions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Features that hang together."""

    number: int
    name: str
    """The tokens that are characteristic of it, the most so first."""
    tokens: list[str]
    members: list[int]
    """The most typical first: by mean similarity to the others."""
    cohesion: float
    """Mean similarity of its pairs; 1 of a single feature."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "id": self.number,
            "name": self.name,
            "tokens": self.tokens,
            "size": len(self.members),
            "cohesion": self.cohesion,
            "members": self.members,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """The groups of a dictionary's features, the tree they were cut from, and what was left out."""

    address: str
    on: On
    leaves: Int[np.ndarray, " n"]
    """The feature of each leaf of the tree."""
    silent: int
    """Features that never fire on the text: left out."""
    tree: Float[np.ndarray, "m 4"]
    """As `_tree` says."""
    distance: float
    """What the tree was cut at."""
    whole: bool
    """Whether all pairs were compared; else the nearest of each feature."""
    clusters: list[Cluster]
    """The largest first."""

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The number of each leaf's cluster."""
        place = {int(f): i for i, f in enumerate(self.leaves)}
        out = np.zeros(len(self.leaves), dtype=np.int64)
        for one in self.clusters:
            for feature in one.members:
                out[place[feature]] = one.number
        return out

    def json(self) -> dict[str, Any]:
        """`{dictionary, on, features, silent, distance, pairs, clusters, leaves, tree}`.

        `tree` is the list of merges, `{left, right, distance, size}`: nodes 0 to n - 1 are
        `leaves`, node n + i is merge i.
        """
        return {
            "dictionary": self.address,
            "on": self.on,
            "features": len(self.leaves),
            "silent": self.silent,
            "distance": self.distance,
            "pairs": "all" if self.whole else f"the {NEAREST} nearest of each feature",
            "clusters": [one.json() for one in self.clusters],
            "leaves": self.leaves.tolist(),
            "tree": [
                {"left": int(i), "right": int(j), "distance": float(d), "size": int(s)}
                for i, j, d, s in self.tree
            ],
        }


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike the features `leaves` are: all pairs, or the nearest of each."""

    leaves: Int[np.ndarray, " n"]
    matrix: Any
    """`[n, n]`: an array of float32, or a `csr_array` of the positive entries."""

    @property
    def whole(self) -> bool:
        """Whether it has all pairs."""
        return isinstance(self.matrix, np.ndarray)


def similarity(one: Indexed, on: On, *, full: int = FULL, nearest: int = NEAREST) -> Similarity:
    """Phi of firing, or cosine of decoder rows, of the features that fire.

    Of more than `full` features only the `nearest` of each are kept, in memory that grows with the
    number of features and not with its square.
    """
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    leaves = np.flatnonzero(one.alive)
    n = len(leaves)
    place = np.full(one.d_sae, -1)
    place[leaves] = np.arange(n)
    blocks = _phi(one, leaves) if on == "together" else _cosine(one, leaves)
    if n <= full:
        matrix = np.zeros((n, n), dtype=np.float32)
        for rows, values in blocks:
            matrix[place[rows]] = values
        return Similarity(leaves, matrix)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for rows, values in blocks:
        at = place[rows]
        values[np.arange(len(at)), at] = 0
        best = np.argpartition(-values, nearest - 1, axis=1)[:, :nearest]
        chosen = np.take_along_axis(values, best, 1)
        keep = chosen > 0
        i = np.broadcast_to(at[:, None], best.shape)[keep]
        parts.append((i, best[keep], chosen[keep]))
    i, j, v = (np.concatenate(p) for p in zip(*parts, strict=True))
    made = csr_array((v, (i, j)), shape=(n, n))
    return Similarity(leaves, made.maximum(made.T).tocsr())


def _phi(one: Indexed, leaves: np.ndarray) -> Any:
    for block in pairs(one):
        rows = leaves[(leaves >= block.first) & (leaves < block.stop)]
        if len(rows):
            yield rows, block.phi[rows - block.first][:, leaves].astype(np.float32)


def _cosine(one: Indexed, leaves: np.ndarray) -> Any:
    directions = unit(one.vectors[leaves])
    step = max(1, 2**24 // len(leaves))
    for first in range(0, len(leaves), step):
        stop = min(len(leaves), first + step)
        yield leaves[first:stop], directions[first:stop] @ directions.T


def cluster(
    store: Store,
    address: str,
    on: On = "together",
    *,
    clusters: int | None = None,
    distance: float | None = None,
) -> tuple[Clustering, Similarity]:
    """Group the features of a dictionary of a store; the groups, and what they were made from."""
    one = from_store(store, address)
    like = similarity(one, on)
    n = len(like.leaves)
    if n < 2:
        raise InputError(f"{n} features of {address} fire on the text: nothing to group")
    if clusters is not None and not 1 <= clusters <= n:
        raise InputError(f"{clusters} clusters of {n} features that fire: give 1 to {n}")
    if distance is not None and not 0 <= distance <= 1:
        raise InputError(
            f"a distance is 0 to 1, one less the mean similarity, and not {distance:g}"
        )
    tree = _tree(like)
    labels, at = cut(tree, clusters=clusters, distance=distance)
    tokens = store.features(address, ["tokens"])["tokens"].to_pylist()
    made = _clusters(like, labels, [tokens[f] or [] for f in like.leaves.tolist()])
    return (
        Clustering(
            address=address,
            on=on,
            leaves=like.leaves,
            silent=one.d_sae - n,
            tree=tree,
            distance=at,
            whole=like.whole,
            clusters=made,
        ),
        like,
    )


def _tree(like: Similarity) -> np.ndarray:
    if like.whole:
        return full_tree(like.matrix)
    entries = like.matrix.tocoo()
    return sparse_tree(len(like.leaves), entries.row, entries.col, entries.data)


def _clusters(like: Similarity, labels: np.ndarray, tokens: list[list[dict]]) -> list[Cluster]:
    groups = [np.flatnonzero(labels == g) for g in range(labels.max() + 1)]
    groups.sort(key=lambda g: (-len(g), int(g[0])))
    names = characteristic(groups, tokens)
    out = []
    for number, (group, words) in enumerate(zip(groups, names, strict=True)):
        within = like.matrix[group][:, group]
        within = np.array(within if like.whole else within.toarray(), dtype=np.float64)
        np.fill_diagonal(within, 0)
        own = within.sum(1) / max(len(group) - 1, 1)
        order = np.argsort(-own, kind="stable")
        out.append(
            Cluster(
                number=number,
                name=" ".join(words[:3]) or "(no common token)",
                tokens=words,
                members=like.leaves[group[order]].tolist(),
                cohesion=float(own.mean()) if len(group) > 1 else 1.0,
            )
        )
    return out


def characteristic(
    groups: list[np.ndarray], tokens: list[list[dict]], count: int = 6
) -> list[list[str]]:
    """Of each group of features, the tokens they fire on more than other features do.

    A token's weight in a group is the mean over its features of the share of their firings that
    are on it; tokens are ranked by that weight times the logarithm of how many times the mean over
    all features it is. A leading space and capitals are not told apart.
    """
    totals: dict[str, float] = {}
    for row in tokens:
        for word, share in _words(row).items():
            totals[word] = totals.get(word, 0.0) + share / len(tokens)
    out = []
    for group in groups:
        weights: dict[str, float] = {}
        for i in group.tolist():
            for word, share in _words(tokens[i]).items():
                weights[word] = weights.get(word, 0.0) + share / len(group)
        scores = {w: s * log(s / totals[w]) for w, s in weights.items() if s > totals[w]}
        out.append(sorted(scores, key=lambda w: (-scores[w], w))[:count])
    return out


def characteristic_tokens(tokens: list[list[dict] | None]) -> list[list[str]]:
    """Of each feature, the tokens it fires on more than others; `tokens` as in the store."""
    return characteristic([np.array([i]) for i in range(len(tokens))], [t or [] for t in tokens])


def _words(row: list[dict]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in row:
        word = visible(one["token"])
        found[word] = found.get(word, 0.0) + one["share"]
    return found


def visible(token: str) -> str:
    """A token without the space before it, in small letters; of white space, signs for it."""
    word = token.strip(" ").lower()
    if word.strip():
        return word.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")
    lines = token.count("\n")
    return "⏎" * min(lines, 3) if lines else "⇥" if "\t" in token else "␣"
