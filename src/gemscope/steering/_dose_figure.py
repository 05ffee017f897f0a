"""The figure of a dose: effect above, cost below, each with its interval, the knee marked."""

from pathlib import Path
from typing import Any

from gemscope.relate import check_figure, save_figure

from ._dose import MOST_PERPLEXITY, MOST_REPETITION, Dose
from ._modes import Unit

_EFFECT, _COST, _GREY, _KNEE = "#2a6f97", "#c1440e", "#6c757d", "#b8860b"
_PANELS = {
    "promoted": ("Promoted tokens", "probability where text is generated"),
    "promoted_at_end": ("Promoted tokens, at the prompt's end", "probability of the next token"),
    "activation": ("The feature, after the edit", "mean activation on generated tokens"),
    "perplexity": ("Perplexity under the unsteered model", "of continuations (logarithmic)"),
    "repetition": ("Repetition", "share of runs of four tokens"),
    "kl": ("Divergence from the unsteered model", "KL on the prompt, nats a token"),
}
_ACROSS = 3


def draw_dose(dose: Dose, file: Path) -> None:
    """Draw effect and cost of each strength with 95% intervals, as .svg, .png or .pdf."""
    from matplotlib.figure import Figure

    check_figure(file)
    measured = (dose.baseline, *dose.points)
    names = [n for n in _PANELS if any(p.measures[n] for p in measured)]
    down = -(-len(names) // _ACROSS)
    figure = Figure(figsize=(3.9 * _ACROSS, 2.9 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, _ACROSS, squeeze=False).flatten()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        _panel(axes, dose, name)
    tokens = "" if dose.promoted is None else f"promotes {' '.join(map(repr, dose.promoted[:5]))}; "
    figure.suptitle(
        f"{dose.feature}, mode {dose.mode} at positions {dose.positions}\n{tokens}"
        f"{len(dose.prompts)} prompts, {dose.settings['max_new_tokens']} new tokens; shaded: 95% "
        f"intervals; {'knee at ' + str(dose.knee) if dose.knee else 'no knee'}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    save_figure(figure, file)


def _panel(axes: Any, dose: Dose, name: str) -> None:
    known = dose.sizes()
    order = list(range(len(dose.points)))
    if known is not None:
        order.sort(key=lambda k: known[k])
    x = list(map(float, range(len(order)))) if known is None else [known[k] for k in order]
    found = [dose.points[k].measures[name] for k in order]
    own = dose.baseline.measures[name]
    heading, unit = _PANELS[name]
    colour = _COST if name in ("perplexity", "repetition", "kl") else _EFFECT
    drawn = [(at, m) for at, m in zip(x, found, strict=True) if m is not None]
    spread = [(at, m.low, m.high) for at, m in drawn if m.low is not None]
    if spread:
        axes.fill_between(*zip(*spread, strict=True), color=colour, alpha=0.2, linewidth=0)
    axes.plot([at for at, _ in drawn], [m.value for _, m in drawn], color=colour, marker="o",
              markersize=3.5, linewidth=1.6)  # fmt: skip
    if own is not None and name != "kl":
        axes.axhline(own.value, color=_GREY, linewidth=1, linestyle=":", label="unsteered")
    if own is not None and name in ("perplexity", "repetition"):
        times = name == "perplexity"
        limit = own.value * MOST_PERPLEXITY if times else own.value + MOST_REPETITION
        axes.axhline(limit, color=_GREY, linewidth=1, linestyle="--", label="limit of the knee")
    if dose.knee is not None:
        place = x[order.index([p.strength for p in dose.points].index(dose.knee))]
        axes.axvline(place, color=_KNEE, linewidth=1.4, label=f"knee, {dose.knee}")
    if name == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    if known is None:
        axes.set_xticks(x, [str(dose.points[k].strength) for k in order])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, which="both")
    axes.set_title(heading, fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xlabel(_strengths(dose), fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _strengths(dose: Dose) -> str:
    """What the strengths are in."""
    units = {p.strength.unit for p in dose.points if p.strength and p.strength.values[0] != 0}
    if len(units) > 1:
        return "strength" if dose.sizes() is None else "strength, absolute"
    match next(iter(units), Unit.ABSOLUTE):
        case Unit.MAX:
            return f"strength, in maxima of the feature ({dose.maximum:.3g})"
        case Unit.NORM:
            return "strength, in lengths of the stream"
        case Unit.CURRENT:
            return "strength, in activations at the token"
        case _:
            return "strength, absolute"
