"""The figure of a circuit: faithfulness and completeness by size, beside random circuits."""

from pathlib import Path
from typing import Any

from gemscope.relate import check_figure, save_figure

from ._sparse_curves import Curves
from ._sparse_found import Circuit

_OWN, _RANDOM, _KEPT = "#2a6f97", "#8a9299", "#c1440e"


def draw_curves(circuit: Circuit, file: Path) -> None:
    """Draw both curves with 95% intervals, as .svg, .png or .pdf."""
    from matplotlib.figure import Figure

    check_figure(file)
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what, heading in (
        (left, "faithfulness", "Faithfulness: only the circuit is left"),
        (right, "completeness", "Completeness: only the circuit is taken out"),
    ):
        _panel(axes, circuit, what, heading)
    left.set_ylabel("share of the metric, 0 = nothing, 1 = whole model", fontsize=8)
    curves = circuit.curves
    prompts = f"{curves.prompts} {'held-out ' if curves.held_out else ''}prompts"
    figure.suptitle(
        f"{circuit.config.task or 'Circuit'}\n{len(circuit.addresses)} dictionaries, "
        f"{circuit.count:,} nodes that change, {prompts}; shaded: 95% over prompts, and of "
        f"{curves.random_circuits} random circuits",
        fontsize=9.5, x=0.01, ha="left",
    )  # fmt: skip
    save_figure(figure, file)


def _panel(axes: Any, circuit: Circuit, what: str, heading: str) -> None:
    curves: Curves = circuit.curves
    x = [point.size for point in curves.points]
    kept = len(circuit.nodes)
    for name, colour, mark in ((what, _OWN, "o"), (f"random_{what}", _RANDOM, "s")):
        found = [getattr(point, name) for point in curves.points]
        if all(one.low is not None for one in found):
            axes.fill_between(x, [one.low for one in found], [one.high for one in found],
                              color=colour, alpha=0.2, linewidth=0)  # fmt: skip
        said = "largest effects" if name == what else "random nodes"
        axes.plot(x, [one.value for one in found], color=colour, marker=mark, markersize=3.5,
                  linewidth=1.6, label=said)  # fmt: skip
    for level in (0, 1):
        axes.axhline(level, color="#ced4da", linewidth=0.8, zorder=0)
    if kept:
        axes.axvline(kept, color=_KEPT, linewidth=1.2, linestyle="--",
                     label=f"above the threshold: {kept}")  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, max(circuit.count, 1))
    ticks = [0, *(10**power for power in range(len(str(circuit.count))))]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_title(heading, fontsize=9.5, loc="left", fontweight="bold")
    axes.set_xlabel("size of the circuit, nodes", fontsize=8)
    if what == "faithfulness":  # the same in both
        axes.legend(fontsize=7.5, frameon=False, loc="center left")
