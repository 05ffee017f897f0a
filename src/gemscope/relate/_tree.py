"""Average-linkage trees of features, of a full matrix or of a sparse one.

A tree has the form of scipy's linkages: `[n - 1, 4]`, each row two nodes, the distance they merge
at, and how many leaves they have together. Leaves are 0 to n - 1, the merge of row `i` is `n + i`.
The distance of two clusters is one less the mean similarity of their pairs; pairs that are
dissimilar, or not in a sparse matrix, count as unrelated: similarity 0, distance 1.
"""

import heapq

import numpy as np
from jaxtyping import Float, Int

FULL = 4_096
"""Up to so many features all pairs are taken: 8 million, half a gigabyte at the peak."""
NEAREST = 32
"""Beyond, only the pairs in which one is among so many nearest of the other."""
DISTANCE = 0.9
"""Where a tree is cut if nothing is said: pairs within a cluster are 0.1 alike on average."""


def full_tree(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "m 4"]:
    """The tree of a full similarity matrix, by scipy."""
    from scipy.cluster.hierarchy import linkage  # type: ignore[import-untyped]
    from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

    distance = 1 - np.clip(similarity, 0, 1)
    np.fill_diagonal(distance, 0)
    return linkage(squareform((distance + distance.T) / 2, checks=False), method="average")


def sparse_tree(
    n: int,
    rows: Int[np.ndarray, " nnz"],
    columns: Int[np.ndarray, " nnz"],
    values: Float[np.ndarray, " nnz"],
) -> Float[np.ndarray, "m 4"]:
    """The same tree of a sparse symmetric matrix; memory is that of its entries.

    Each pair may be given once or twice. A mean over merged clusters is never above the larger of
    the two, so an entry of the queue made before a merge bounds what it stands for: it is looked
    up again when its turn comes, and merged only if it still is what it was.
    """
    links: list[dict[int, float]] = [{} for _ in range(n)]
    for i, j, v in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True):
        if i != j and v > 0:
            links[i][j] = links[j][i] = min(v, 1.0)
    root, size, node = list(range(n)), [1] * n, list(range(n))
    queue = [(-v, i, j) for i, row in enumerate(links) for j, v in row.items() if i < j]
    heapq.heapify(queue)
    tree: list[tuple[int, int, float, int]] = []
    while queue:
        bound, i, j = heapq.heappop(queue)
        i, j = _find(root, i), _find(root, j)
        if i == j:
            continue
        value = links[i][j] / (size[i] * size[j])
        if value < -bound - 1e-12:
            heapq.heappush(queue, (-value, i, j))
            continue
        kept, gone = (i, j) if len(links[i]) >= len(links[j]) else (j, i)
        _merge(links, kept, gone)
        tree.append((node[i], node[j], 1 - value, size[i] + size[j]))
        root[gone], size[kept], node[kept] = kept, size[i] + size[j], n + len(tree) - 1
    _join_rest(tree, [i for i in range(n) if root[i] == i], size, node, n)
    return np.array(tree, dtype=float).reshape(-1, 4)


def _merge(links: list[dict[int, float]], kept: int, gone: int) -> None:
    """Add the sums of `gone` to those of `kept`, in its neighbours' rows too."""
    for other, total in links[gone].items():
        row = links[other]
        del row[gone]
        if other != kept:
            links[kept][other] = row[kept] = row.get(kept, 0.0) + total
    links[gone] = {}


def _join_rest(
    tree: list[tuple[int, int, float, int]], roots: list[int], size: list[int], node: list[int],
    n: int,
) -> None:  # fmt: skip
    """Clusters without a similar pair between them merge at distance 1, one after the other."""
    for other in roots[1:]:
        first = roots[0]
        size[first] += size[other]
        tree.append((node[first], node[other], 1.0, size[first]))
        node[first] = n + len(tree) - 1


def _find(root: list[int], i: int) -> int:
    while root[i] != i:
        root[i] = root[root[i]]
        i = root[i]
    return i


def cut(
    tree: Float[np.ndarray, "m 4"], *, clusters: int | None = None, distance: float | None = None
) -> tuple[Int[np.ndarray, " n"], float]:
    """The cluster of each leaf, numbered from 0, and the distance the tree was cut at.

    Cut into `clusters`, or at `distance`, or with neither at `DISTANCE`.
    """
    from scipy.cluster.hierarchy import fcluster

    n = len(tree) + 1
    heights = tree[:, 2]
    if clusters is not None:
        # Merges are in ascending order: the first n - clusters of them are made.
        made = n - clusters
        at = float(heights[made - 1]) if made else 0.0
        labels = fcluster(_cut_by_rank(tree), made - 0.5, criterion="distance")
    else:
        at = DISTANCE if distance is None else distance
        labels = fcluster(tree, at, criterion="distance")
    _, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), at


def _cut_by_rank(tree: np.ndarray) -> np.ndarray:
    """The tree with the ranks of its merges for distances: ties are cut in the order made."""
    ranked = tree.copy()
    ranked[:, 2] = np.arange(len(tree))
    return ranked
