"""A graph as a figure: tokens across, layers up, targets on top.

Groups are one box each. Of a large graph the nodes of most influence are drawn, and of the edges
those that carry most of what comes into each node; the title says how many.
"""

import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.errors import InputError
from gemscope.relate import check_figure, save_figure

from ._graph import CONSTANTS, Edges, Graph, Kind
from ._groups import Merged, merged
from ._json import clean

MOST = 60
"""Nodes that one figure holds."""
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"  # Okabe and Ito's: told apart by the colour-blind
_FILL = {Kind.FEATURE: "#ffffff", Kind.ERROR: "#e3e3e3", Kind.EMBEDDING: "#f2efe4",
         Kind.TARGET: "#fff3c4"}  # fmt: skip
_MARKER = {Kind.FEATURE: "o", Kind.ERROR: "D", Kind.EMBEDDING: "s", Kind.TARGET: "s"}
_INK, _GREY = "#222222", "#6c757d"
_CELL, _ROW = 1.05, 0.82
"""Inches that a node has to itself."""
_SHARE = 0.85
"""Of what comes into each node, how much the edges drawn carry at least."""


@dataclass(frozen=True, slots=True)
class _Spot:
    """A node of the figure."""

    place: int
    x: float
    y: float
    kind: Kind
    grouped: int
    """How many nodes it stands for, if it is a group."""
    label: str
    size: float


def draw(graph: Graph, path: str | Path) -> Path:
    """Draw a graph as `.svg`, `.png` or `.pdf`; constants are left out.

    Raises:
        InputError: Another format, or a file that cannot be written.
    """
    from matplotlib.figure import Figure

    file = Path(path).expanduser()
    check_figure(file)
    one = merged(graph)
    chosen = _chosen(graph, one)
    spots, columns, rows = _laid_out(graph, one, chosen)
    if not spots:
        raise InputError("the graph has nothing but constants; there is nothing to draw")
    width, height = columns[-1][2] + 0.25, max(y for _, y in rows) + 0.75
    head, foot = 0.95, 0.95
    figure = Figure(figsize=(max(width + 1.0, 7.5), height + head + foot))
    w, h = figure.get_size_inches()
    axes = figure.add_axes((0.85 / w, foot / h, (w - 1.0) / w, height / h))
    # One unit is an inch, so that what is laid out apart is apart.
    axes.set(xlim=(0, w - 1.0), ylim=(-0.3, height - 0.3))
    axes.axis("off")
    _grid(axes, columns, rows)
    shown, total = _edges(axes, one, spots)
    _spots(axes, spots)
    many = sum(graph.nodes[graph.place(ids[0])].kind not in CONSTANTS for ids in one.members)
    _title(figure, graph, f"{len(spots)} of {many} nodes, {shown} of {total} edges between them")
    _legend(figure, spots)
    save_figure(figure, file)
    return file


def _chosen(graph: Graph, one: Merged) -> list[int]:
    """Which nodes are drawn: targets, what is grouped or pinned, and the rest by influence."""
    first = [graph.nodes[graph.place(ids[0])] for ids in one.members]
    joined = set(one.edges.source.tolist()) | set(one.edges.target.tolist())
    joined |= {p for p, node in enumerate(first) if node.kind is Kind.TARGET}
    able = [p for p in joined if first[p].kind not in CONSTANTS]
    named = {i for g in graph.groups for i in g.ids} | set(graph.pinned)

    def order(place: int) -> tuple[bool, bool, float]:
        kept = first[place].kind is Kind.TARGET
        marked = any(i in named for i in one.members[place])
        return (not kept, not marked, -one.influence[place].item())

    return sorted(sorted(sorted(able), key=order)[:MOST])


def _laid_out(
    graph: Graph, one: Merged, chosen: list[int]
) -> tuple[list[_Spot], list[tuple[str, float, float]], list[tuple[str, float]]]:
    """Nodes at their places, in inches; columns with their ends, and rows."""
    top = 1 + max([0, *(n.layer for n in graph.nodes if n.layer is not None)])
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in chosen:
        nodes = [graph.nodes[graph.place(i)] for i in one.members[place]]
        layers = [_row_of(node.kind, node.layer, top) for node in nodes]
        at = [
            graph.targets[n.number or 0].position if n.kind is Kind.TARGET else n.position or 0
            for n in nodes
        ]
        # A group stands where most of it does, as far as a whole place is that.
        cells[sorted(at)[len(at) // 2], sorted(layers)[len(layers) // 2]].append(place)
    # A long prompt is wide enough as it is: what is at one place stands in more rows.
    across = 3 if len({p for p, _ in cells}) <= 6 else 2
    columns, starts, x = [], {}, 0.1
    for position in sorted({p for p, _ in cells}):
        wide = max(min(len(v), across) for (p, _), v in cells.items() if p == position)
        starts[position] = (x, wide)
        token = clean(graph.tokens[position])
        columns.append((f"{_short(token, 10 * wide)}\n{position}", x, x + wide * _CELL))
        x += wide * _CELL + 0.12
    rows, heights, y = [], {}, 0.35
    for row in sorted({r for _, r in cells}):
        deep = max(-(-len(v) // across) for (_, r), v in cells.items() if r == row)
        heights[row] = y
        name = "tokens" if row < 0 else "targets" if row == top else f"layer {row}"
        rows.append((name, y + (deep - 1) * _ROW / 2))
        y += deep * _ROW + 0.25
    spots = []
    largest = max([1e-12, *(one.influence[p].item() for p in chosen)])
    for (position, row), places in sorted(cells.items()):
        x, wide = starts[position]
        places.sort(key=lambda p: -one.influence[p].item())
        for number, place in enumerate(places):
            deep, along = divmod(number, across)
            beside = min(len(places) - deep * across, across)
            at_x = x + (along + (wide - beside) / 2 + 0.5) * _CELL
            spots.append(_spot(graph, one, place, at_x, heights[row] + deep * _ROW, largest))
    return spots, columns, rows


def _row_of(kind: Kind, layer: int | None, top: int) -> int:
    return {Kind.EMBEDDING: -1, Kind.TARGET: top}.get(kind, layer or 0)


def _spot(
    graph: Graph, one: Merged, place: int, x: float, y: float, largest: float
) -> _Spot:  # fmt: skip
    ids = one.members[place]
    node = graph.nodes[graph.place(ids[0])]
    grouped = len(ids) if any(ids[0] in g.ids for g in graph.groups) else 0
    label = clean(one.labels[place])
    if not grouped and node.id not in graph.labels:
        if node.kind in (Kind.EMBEDDING, Kind.ERROR):
            label = ""  # the column's name, and the marker, say it
        elif node.kind is Kind.TARGET:
            chance = graph.targets[node.number or 0].probability
            label += "" if chance is None else f" {chance:.0%}"
        elif graph.address(node) in graph.labels:
            label = f"{label} ({node.layer}.{node.feature})"
        else:
            label = f"{node.layer}.{node.feature}"
    size = 60 + 260 * min(1.0, one.influence[place].item() / largest) ** 0.5
    return _Spot(place, x, y, node.kind, grouped, label, size)


def _grid(
    axes: Any, columns: list[tuple[str, float, float]], rows: list[tuple[str, float]]
) -> None:
    for number, (token, left, right) in enumerate(columns):
        if number % 2:
            axes.axvspan(left - 0.06, right + 0.06, color="#f7f7f7", zorder=0)
        axes.text((left + right) / 2, -0.36, token, ha="center", va="top", fontsize=8.5,
                  color=_INK, parse_math=False, clip_on=False)  # fmt: skip
    for name, y in rows:
        axes.text(-0.1, y, name, ha="right", va="center", fontsize=8, color=_GREY)


def _edges(axes: Any, one: Merged, spots: list[_Spot]) -> tuple[int, int]:
    """Draw the edges that matter; how many of those between the nodes shown."""
    from matplotlib.patches import FancyArrowPatch

    at = {spot.place: spot for spot in spots}
    n = len(one.labels)
    there = torch.zeros(n, dtype=torch.bool)
    there[list(at)] = True
    edges = one.edges.only(there[one.edges.source.long()] & there[one.edges.target.long()])
    sums = torch.zeros(n, dtype=torch.float64)
    sums.index_add_(0, edges.target.long(), edges.weight.abs().double())
    parts = edges.weight.abs().double() / sums[edges.target.long()].clamp(min=1e-12)
    keep = _leading(edges, parts)
    rows = sorted(zip(parts[keep].tolist(), edges.source[keep].tolist(),
                      edges.target[keep].tolist(), edges.weight[keep].tolist(),
                      strict=True))  # fmt: skip
    for part, s, t, weight in rows:
        a, b = at[s], at[t]
        bend = 0.0 if abs(a.x - b.x) > 0.05 else 0.16
        axes.add_patch(
            FancyArrowPatch(
                (a.x, a.y), (b.x, b.y), connectionstyle=f"arc3,rad={bend}", arrowstyle="-",
                linewidth=0.4 + 3.2 * part, color=POSITIVE if weight > 0 else NEGATIVE,
                alpha=0.25 + 0.6 * part, zorder=1, linestyle="-" if weight > 0 else (0, (4, 1.5)),
            )
        )  # fmt: skip
    return len(rows), len(edges)


def _leading(edges: Edges, parts: torch.Tensor) -> torch.Tensor:
    """Of what comes into each node, the largest that make up most of it."""
    keep = torch.zeros(len(edges), dtype=torch.bool)
    run: dict[int, float] = defaultdict(float)
    for index in parts.argsort(descending=True, stable=True).tolist():
        target = int(edges.target[index])
        if run[target] < _SHARE:
            keep[index] = True
            run[target] += parts[index].item()
    return keep


def _spots(axes: Any, spots: list[_Spot]) -> None:
    for spot in spots:
        lines = _wrapped(spot.label)
        if spot.grouped:
            box = {"boxstyle": "round,pad=0.35", "fc": "#eef4fb", "ec": _INK, "lw": 1.3}
            axes.text(spot.x, spot.y, f"{lines}\n({spot.grouped} nodes)", ha="center", va="center",
                      fontsize=7, parse_math=False, zorder=4, color=_INK, bbox=box)  # fmt: skip
            continue
        axes.scatter([spot.x], [spot.y], s=spot.size, marker=_MARKER[spot.kind], zorder=3,
                     facecolor=_FILL[spot.kind], edgecolor=_INK, linewidth=0.9)  # fmt: skip
        if lines:
            below = spot.y - 0.07 - (spot.size**0.5) / 144
            axes.text(spot.x, below, lines, ha="center", va="top", fontsize=6.8, color=_INK,
                      parse_math=False, zorder=4, linespacing=1.0,
                      bbox={"boxstyle": "square,pad=0.08", "fc": "white", "ec": "none",
                            "alpha": 0.8})  # fmt: skip


def _title(figure: Any, graph: Graph, counts: str) -> None:
    prompt = _short(clean(graph.prompt), 110)
    names = sorted(set(graph.dictionaries))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    w, h = figure.get_size_inches()
    wide = int(w * 14)
    figure.text(0.15 / w, 1 - 0.12 / h, textwrap.shorten(f"“{prompt}”", wide, placeholder="…”"),
                fontsize=11, fontweight="bold", va="top", parse_math=False)  # fmt: skip
    said = (
        f"{clean(graph.model)}, {_short(clean(names[0]), 50) if names else 'no dictionary'}{more}\n"
        f"replacement {graph.scores.replacement:.2f}, completeness "
        f"{graph.scores.completeness:.2f}; {counts}"
    )
    figure.text(0.15 / w, 1 - 0.38 / h, said, fontsize=8, va="top", color=_GREY, parse_math=False)


def _legend(figure: Any, spots: list[_Spot]) -> None:
    from matplotlib.lines import Line2D

    names = {Kind.FEATURE: "feature", Kind.ERROR: "error", Kind.EMBEDDING: "token",
             Kind.TARGET: "target"}  # fmt: skip
    kinds = [kind for kind in names if any(s.kind is kind and not s.grouped for s in spots)]
    handles = [
        Line2D([], [], linestyle="", marker=_MARKER[kind], markerfacecolor=_FILL[kind],
               markeredgecolor=_INK, markersize=7, label=names[kind])
        for kind in kinds
    ]  # fmt: skip
    handles += [Line2D([], [], color=POSITIVE, linewidth=2, label="adds"),
                Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=(0, (4, 1.5)),
                       label="takes away (width: share of what comes in)")]  # fmt: skip
    figure.legend(handles=handles, loc="lower left", ncol=len(handles), fontsize=7.5,
                  frameon=False, handletextpad=0.4, columnspacing=1.2)  # fmt: skip


def _wrapped(label: str) -> str:
    lines = textwrap.wrap(label, 15, break_long_words=True, max_lines=3, placeholder="…")
    return "\n".join(lines)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
