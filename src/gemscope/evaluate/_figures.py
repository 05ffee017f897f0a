"""The figures of a report, as SVG: titled, with units, readable in grey."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ._record import Record

COLOURS = ("#2a6f97", "#c1440e", "#4f772d", "#7b2d8b", "#b8860b", "#444444", "#008b8b", "#a0522d")
_MARKERS = "osD^vP*X"
MANY = len(COLOURS)
"""Records that can be told apart by colour; more are shown as a scope."""


def figures(records: Sequence["Record"]) -> dict[str, str]:
    """The figures that `records` allow, by name: each a complete SVG document."""
    out = {}
    if len(records) > 1:
        out["pareto"] = _pareto(records)
    out["loss"] = _loss(records)
    out["density"] = _density(records)
    out["positions"] = _positions(records)
    if any(record.layers for record in records):
        out["layers"] = _layers([record for record in records if record.layers])
    return out


def _pareto(records: Sequence["Record"]) -> str:
    figure, axes = _axes("Sparsity against reconstruction", 6.4, 4.0)
    for i, record in enumerate(records):
        m, spread = record.metrics, record.intervals.get("fvu")
        bars = None if spread is None else np.abs(np.array(spread)[:, None] - m["fvu"])
        axes.errorbar(m["l0"], m["fvu"], yerr=bars, label=record.label, **_style(i), markersize=8)
    axes.set_xlabel("L0 (features per token)")
    axes.set_ylabel("FVU (share of variance; lower is better)")
    axes.set_ylim(bottom=0)
    low, high = axes.get_xlim()
    axes.set_xlim(max(0, low - 5), high + 5)
    return _svg(figure, axes)


def _loss(records: Sequence["Record"]) -> str:
    figure, axes = _axes("What the model loses when the activation is replaced", 6.4, 4.0)
    kinds = (
        ("delta_loss", "the dictionary", COLOURS[0]),
        ("random", "a random dictionary", "#bbbbbb"),
        ("loss_mean", "the mean activation", "#888888"),
        ("loss_zero", "zeros", "#555555"),
    )
    width, places = 0.2, np.arange(len(records))
    for k, (name, label, colour) in enumerate(kinds):
        values = [_increase(record, name) for record in records]
        bars = axes.bar(places + (k - 1.5) * width, values, width, label=label, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(places, [record.label.replace(", ", "\n") for record in records], fontsize=8)
    axes.set_ylabel("increase of the loss (nats per token)")
    return _svg(figure, axes, title="replaced by")


def _increase(record: "Record", name: str) -> float:
    clean = record.metrics["loss_clean"]
    if name == "delta_loss":
        return record.metrics["delta_loss"]
    if name == "random":
        return record.baseline.get("delta_loss", 0.0)
    return record.metrics[name] - clean


def _density(records: Sequence["Record"]) -> str:
    figure, axes = _axes("How often features fire", 6.4, 4.0)
    for i, record in enumerate(records):
        edges = np.array(record.density["log10_edges"])
        counts = np.array(record.density["features"])
        dead = record.metrics["dead_fraction"]
        axes.stairs(
            counts, 10.0**edges, label=f"{record.label} ({dead:.1%} silent)",
            color=COLOURS[i % len(COLOURS)], linewidth=1.6,
        )  # fmt: skip
    axes.set_xscale("log")
    tokens = max(record.tokens for record in records)
    axes.set_xlim(0.5 / tokens, 1)
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("density (share of tokens a feature fires on)")
    axes.set_ylabel("features per quarter decade")
    return _svg(figure, axes)


def _positions(records: Sequence["Record"]) -> str:
    figure, axes = _axes("Reconstruction error along the context", 6.4, 4.0)
    for i, record in enumerate(records):
        x = [p["from"] for p in record.positions]
        axes.plot(x, [p["fvu"] for p in record.positions], label=record.label, **_style(i))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the context (tokens after BOS; each point up to the next)")
    axes.set_ylabel("squared error (share of overall variance)")
    return _svg(figure, axes)


def _layers(records: Sequence["Record"]) -> str:
    figure, axes = _axes("Multi-layer models, layer by layer", 6.4, 4.0)
    for i, record in enumerate(records):
        x = [int(str(layer["site"]).split(".")[0]) for layer in record.layers]
        axes.plot(x, [layer["fvu"] for layer in record.layers], label=record.label, **_style(i))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer written")
    axes.set_ylabel("FVU (share of variance; lower is better)")
    return _svg(figure, axes)


def _style(index: int) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    return {"color": colour, "marker": _MARKERS[index % len(_MARKERS)], "linewidth": 1.4}


def _axes(title: str, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, title)
    return figure, axes


def dress(axes: Any, title: str) -> None:
    """Give axes the look that all figures share."""
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=9)


def _svg(figure: Any, axes: Any, *, title: str | None = None) -> str:
    if len(axes.get_legend_handles_labels()[0]) > 1 or title:
        axes.legend(fontsize=8, frameon=False, title=title, title_fontsize=8)
    return svg(figure)


def svg(figure: Any) -> str:
    """A figure as a complete SVG document."""
    import matplotlib

    out = io.StringIO()
    # The same figure gives the same bytes: fixed ids, no date.
    with matplotlib.rc_context({"svg.hashsalt": "gemscope"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
