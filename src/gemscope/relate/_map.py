"""A map of features in two dimensions, and its figure."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ._cluster import Clustering, Similarity
from ._figures import new_figure, save_figure
from ._tree import FULL

_PARTS = 48
_NAMED = 24
_NEIGHBOURS = 12
"""The perplexity: how many features count as near."""
_COLOURS = (
    "#2a6f97", "#c1440e", "#4f772d", "#7b2d8b", "#b8860b", "#008b8b", "#a0522d", "#d63384",
    "#5c677d", "#2b9348", "#6a4c93", "#e07a1f",
)  # fmt: skip


def layout(like: Similarity, *, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Places of the features on a map: near where they are similar.

    Laid out by t-SNE (scikit-learn) in a fixed number of rounds, from the distances
    `sqrt(2 - 2 s)` where all pairs are known, else from the principal components of the rows. The
    same seed gives the same map. Only nearness means anything: distances between far groups, and
    the axes, do not.
    """
    n = like.matrix.shape[0]
    if n < 5:
        return np.stack([np.arange(n, dtype=float), np.zeros(n)], axis=1)
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    parts = min(_PARTS, n - 1)
    matrix = np.maximum(like.matrix, 0) if like.whole else like.matrix
    reduced = TruncatedSVD(parts, random_state=seed).fit_transform(matrix)
    begin = reduced[:, :2] / max(float(reduced[:, 0].std()), 1e-12) * 1e-4
    metric = "euclidean"
    if like.whole:
        reduced, metric = np.sqrt(2 - 2 * np.minimum(matrix, 1)), "precomputed"
        np.fill_diagonal(reduced, 0)
    made = TSNE(
        perplexity=min(_NEIGHBOURS, (n - 1) / 4),
        init=begin.astype(np.float32),
        metric=metric,
        max_iter=750 if n <= FULL else 350,
        random_state=seed,
    ).fit_transform(reduced)
    return made.astype(float)


def map_json(made: Clustering, places: Float[np.ndarray, "n 2"]) -> list[dict[str, Any]]:
    """`{feature, x, y, cluster}` of every feature."""
    return [
        {"feature": int(f), "x": float(x), "y": float(y), "cluster": int(c)}
        for f, (x, y), c in zip(made.leaves, places, made.labels, strict=True)
    ]


def plot_map(made: Clustering, places: Float[np.ndarray, "n 2"], file: Path) -> None:
    """Draw the map: clusters of three or more in colour, the largest with their names."""
    figure, (axes,) = new_figure(8.0, 6.6)
    labels = made.labels
    told = [one for one in made.clusters if len(one.members) >= 3]
    shown = {one.number for one in told}
    rest = np.array([label not in shown for label in labels])
    axes.scatter(*places[rest].T, s=7, color="#c8ccd0", linewidths=0)
    for one in told:
        colour = _COLOURS[one.number % len(_COLOURS)]
        mine = places[labels == one.number]
        axes.scatter(*mine.T, s=15, color=colour, linewidths=0)
        if one.number < _NAMED:
            # Over the middle of most of them: a member far off must not carry the name away.
            x, y = np.median(mine, axis=0)
            near = mine[np.abs(mine - (x, y)).max(1) <= np.ptp(places) / 12]
            axes.annotate(
                _safe(one.name), (x, near[:, 1].max() if len(near) else y), fontsize=8,
                color=colour, ha="center", va="bottom", fontweight="bold", xytext=(0, 4),
                textcoords="offset points",
            )  # fmt: skip
    how = "firing together (phi)" if made.on == "together" else "decoder directions (cosine)"
    axes.set_title(f"Features by {how}\n{made.address}", fontsize=10, loc="left", fontweight="bold")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(
        f"t-SNE of {len(made.leaves):,} features, in colour the {len(told):,} clusters of three or "
        f"more, the largest {min(_NAMED, len(told))} named; nearness alone has a meaning",
        fontsize=8,
    )
    save_figure(figure, file)


def _safe(text: str) -> str:
    # A dollar sign would begin mathematics.
    return text.replace("$", r"\$")
