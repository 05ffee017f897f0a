"""How many features rules explain: numbers, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Explanation, Score

LEVELS = (0.8, 0.9)
"""Balanced accuracies above which features are counted."""
_COLOURS = ("#2a6f97", "#c1440e", "#4f772d", "#7b2d8b", "#b8860b", "#444444", "#008b8b", "#a0522d")


def rule_summary(
    explanations: Sequence[Explanation], *, features: int | None = None
) -> dict[str, Any]:
    """Of the rules among `explanations`: how many are above 0.8 and 0.9 balanced accuracy on
    held-out documents, and how many other features' rules are, scored on the same places.

    Shares are of the rules with a score; of a dictionary of `features` features, the share of all
    of them is told too, and how many have no rule. None stands where there is nothing to divide by.
    """
    rules = [e for e in explanations if e.method == "rule"]
    scores = [s for e in rules if (s := _score(e, "rule")) is not None]
    values = np.array([s.value for s in scores])
    nulls = np.array([s.null for s in scores if s.null is not None])
    lows = np.array([s.low for s in scores])
    simulated = [s.value for e in rules if (s := _score(e, "simulation")) is not None]
    out: dict[str, Any] = {
        "rules": len(rules),
        "scored": len(scores),
        "above": {f"{level}": _share(values > level) for level in LEVELS},
        "above_null": {f"{level}": _share(nulls > level) for level in LEVELS},
        "surely_above": {f"{level}": _share(lows > level) for level in LEVELS},
        "median": _median(values),
        "median_null": _median(nulls),
        "median_precision": _median([s.detail["precision"] for s in scores]),
        "median_recall": _median([s.detail["recall"] for s in scores]),
        "median_simulation": _median(simulated),
    }
    if features is not None:
        out["features"] = features
        out["without_rule"] = features - len({(e.dictionary, e.feature) for e in rules})
        out["of_all_above"] = {
            f"{level}": float((values > level).sum() / features) if features else None
            for level in LEVELS
        }
    return out


def draw_rule_scores(per_dictionary: Mapping[str, Sequence[Explanation]], file: Path) -> None:
    """Draw, for each dictionary, the share of its rules that reach a balanced accuracy.

    Dashed in grey: the rules of other features on the same places. Of more than eight dictionaries
    those of one folder of addresses share a colour.
    """
    from matplotlib.figure import Figure

    if file.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"a figure is written as .svg, .png or .pdf, not as {file.name!r}")
    found = {name: _values(rows) for name, rows in per_dictionary.items()}
    found = {name: pair for name, pair in found.items() if len(pair[0])}
    if not found:
        raise InputError("there is no rule with a score to draw")
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    many = len(found) > len(_COLOURS)
    groups = [name.rpartition("/")[0] or name if many else name for name in found]
    colours = {g: _COLOURS[i % len(_COLOURS)] for i, g in enumerate(dict.fromkeys(groups))}
    for group, (values, _) in zip(groups, found.values(), strict=True):
        label = f"{group}: {_share(_of_group(groups, found, group) > LEVELS[0]):.0%}"
        _curve(axes, values, colours[group], "-", None if label in _labels(axes) else label)
    nulls = np.concatenate([null for _, null in found.values()])
    if len(nulls):
        _curve(axes, nulls, "#777777", "--", f"another feature's rule: {_share(nulls > 0.8):.0%}")
    for level in LEVELS:
        axes.axvline(level, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlim(0.3, 1.0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("balanced accuracy on held-out documents (0.5: no better than chance)")
    axes.set_ylabel("share of scored rules with at least that")
    axes.set_title("What short rules explain", loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(
        loc="outside lower left", fontsize=8, frameon=False, title="share above 0.8",
        title_fontsize=8, ncols=1 if len(colours) < 5 else 2,
    )  # fmt: skip
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def _curve(axes: Any, values: np.ndarray, colour: str, line: str, label: str | None) -> None:
    ordered = np.sort(values)
    share = 1 - np.arange(len(ordered)) / len(ordered)
    x, y = np.concatenate(([0.0], ordered, [1.0])), np.concatenate(([1.0], share, [0.0]))
    # From one score to the next, as many reach it as have the next or more.
    axes.step(x, y, where="pre", color=colour, linestyle=line, linewidth=1.4, label=label)


def _labels(axes: Any) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def _of_group(
    groups: Sequence[str], found: Mapping[str, tuple[np.ndarray, np.ndarray]], group: str
) -> np.ndarray:
    pairs = zip(groups, found.values(), strict=True)
    return np.concatenate([values for name, (values, _) in pairs if name == group])


def _values(rows: Sequence[Explanation]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the rules, and their nulls."""
    scores = [s for e in rows if e.method == "rule" and (s := _score(e, "rule")) is not None]
    nulls = [s.null for s in scores if s.null is not None]
    return np.array([s.value for s in scores]), np.array(nulls, dtype=np.float64)


def _score(explanation: Explanation, name: str) -> Score | None:
    return next((s for s in explanation.scores if s.name == name), None)


def _share(which: np.ndarray) -> float | None:
    return float(np.mean(which)) if len(which) else None


def _median(values: Any) -> float | None:
    return float(np.median(values)) if len(values) else None
