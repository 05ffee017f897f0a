"""Figures of relations: titled, with axes that say what they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.errors import InputError

from ._compare import Comparison
from ._track import KINDS, Step

A, B, GREY = "#c1440e", "#2a6f97", "#b9bfc4"
SUFFIXES = (".svg", ".png", ".pdf")


def check_figure(file: Path) -> None:
    """Refuse a figure that cannot be drawn, before anything is computed for it."""
    if file.suffix not in SUFFIXES:
        raise InputError(f"a figure is written as .svg, .png or .pdf, not as {file.name!r}")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file} cannot be written: there is no folder {file.absolute().parent}")


def new_figure(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    """A figure with `count` axes side by side, dressed alike."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure; the same figure gives the same bytes."""
    import matplotlib

    dated = {".png": "Creation Time", ".pdf": "CreationDate", ".svg": "Date"}[file.suffix]
    try:
        with matplotlib.rc_context({"svg.hashsalt": "gemscope"}):
            figure.savefig(file, dpi=150, metadata={dated: None})
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def plot_comparisons(comparisons: Sequence[Comparison], file: Path, *, q: float = 0.05) -> None:
    """Draw density against density; what differs in colour, the surest with their numbers."""
    figure, axes = new_figure(5.6, 5.2, len(comparisons))
    for one, place in zip(comparisons, axes, strict=True):
        _densities(place, one, q)
    save_figure(figure, file)


def _densities(axes: Any, one: Comparison, q: float) -> None:
    # What is silent on one side stands below the least density there can be on it.
    floors = [0.5 / side.tokens for side in (one.a, one.b)]
    x, y = (np.maximum(s.density, f) for s, f in zip((one.b, one.a), floors[::-1], strict=True))
    more = {"a": one.more_in("a", q=q), "b": one.more_in("b", q=q)}
    rest = np.setdiff1d(np.flatnonzero(one.fires), more["a"] + more["b"])
    axes.scatter(
        x[rest], y[rest], s=9, color=GREY, linewidths=0, label=f"no difference told ({len(rest)})"
    )
    for side, colour, marker in (("a", A, "o"), ("b", B, "^")):
        name = getattr(one, side).name
        chosen = more[side]
        axes.scatter(x[chosen], y[chosen], s=16, color=colour, marker=marker, linewidths=0,
                     label=f"denser in {name} ({len(chosen)})")  # fmt: skip
        shift, align = ((-5, 3), "right") if side == "a" else ((5, -8), "left")
        for feature in chosen[:6]:
            axes.annotate(str(feature), (x[feature], y[feature]), fontsize=7, color=colour,
                          xytext=shift, textcoords="offset points", ha=align)  # fmt: skip
    shown = np.concatenate([x[one.fires], y[one.fires]])
    low, high = (float(shown.min()) if len(shown) else min(floors)) * 0.6, 1.4
    axes.plot([low, high], [low, high], color="#888888", linewidth=0.8, zorder=0)
    for draw, floor in ((axes.axvline, floors[1]), (axes.axhline, floors[0])):
        draw(floor, color="#dddddd", linewidth=0.8, linestyle=":", zorder=0)
    silent = "; dotted: silent" if low < max(floors) else ""
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel(f"density in {one.b.name} (share of {one.b.tokens:,} tokens{silent})")
    axes.set_ylabel(f"density in {one.a.name} (share of {one.a.tokens:,} tokens)")
    axes.set_title(f"{one.a.name} against {one.b.name}\n{one.address}, q ≤ {q:g}",
                   fontsize=10, loc="left", fontweight="bold")  # fmt: skip
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def plot_track(steps: Sequence[Step], file: Path) -> None:
    """Draw how many features are passed on, transformed, born and vanish at every step."""
    figure, (axes,) = new_figure(max(5.0, 1.6 + 0.7 * len(steps)), 4.2)
    bottom = np.zeros(len(steps))
    x = np.arange(len(steps))
    colours = ("#2a6f97", "#b8860b", "#4f772d", "#888888")
    for kind, colour in zip(KINDS[:3], colours, strict=False):
        counts = np.array([step.counts[kind] for step in steps])
        axes.bar(x, counts, 0.7, bottom=bottom, label=kind, color=colour)
        bottom += counts
    gone = np.array([-step.counts["vanished"] for step in steps])
    axes.bar(x, gone, 0.7, label="vanished (of the layer before)", color=colours[3], hatch="//")
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_xticks(x, [f"{a} to {b}" for a, b in (s.layers for s in steps)])
    axes.set_xlabel("layers")
    axes.set_ylabel("features")
    axes.set_title("What becomes of features from layer to layer", fontsize=10, loc="left",
                   fontweight="bold")  # fmt: skip
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, file)
