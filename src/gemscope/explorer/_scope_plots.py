"""What the scope plots: sparsity against a figure, and ladders that differ in one thing."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._scope import Cell

_Y = {"fvu": "FVU", "delta_loss": "Delta loss (nats per token)", "dead": "Dead (share)"}


def plots(cells: Sequence["Cell"], colour: str) -> list[dict[str, Any]]:
    """Figures as data: `title`, `x`, `y`, and `lines` of points `[x, y, address]`, each with its
    `family`, which has a colour. Only artefacts of which both figures were measured are in them.
    """
    y = colour if colour in _Y else "fvu"
    known = [c for c in cells if c.figures["l0"] is not None and c.figures[y] is not None]
    pareto = _lines(known, lambda c: (c.part, c.layer, c.d_sae), _l0, y)
    widths = _lines(known, lambda c: (c.part, c.layer, c.nominal_l0), lambda c: c.d_sae, y)
    # Widths at one L0: steps of a ladder, unless all are as wide.
    ladder = [line for line in widths if len({p[0] for p in line["points"]}) > 1]
    steps = [line for line in pareto if len(line["points"]) > 2]
    found = [
        ("Sparsity against {y}", "L0 (features per token)", pareto),
        ("Ladders of width, at one site and nominal L0", "Width (features)", ladder),
        ("Ladders of L0, at one site and width", "L0 (features per token)", steps),
    ]
    return [
        {"title": title, "x": x, "y": _Y[y], "lines": lines} for title, x, lines in found if lines
    ]


def families(cells: Iterable["Cell"]) -> list[str]:
    """Parts in the order of their colours."""
    return list(dict.fromkeys(c.part for c in cells))


def _l0(cell: "Cell") -> float:
    value = cell.figures["l0"]
    assert value is not None
    return value


def _lines(
    cells: Sequence["Cell"], key: Callable[["Cell"], Hashable], x: Callable[["Cell"], float], y: str
) -> list[dict[str, Any]]:
    groups: dict[Hashable, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[key(cell)].append(cell)
    order = families(cells)
    return [
        {
            "family": order.index(group[0].part),
            "name": group[0].part,
            "points": [[x(c), c.figures[y], c.address] for c in sorted(group, key=x)],
        }
        for group in groups.values()
    ]
