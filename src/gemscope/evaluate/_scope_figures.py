"""Figures of a whole scope: what no legend of dozens of names could tell, told by place and colour.

Dictionaries of the same kind and stream share a panel; a layer is a colour everywhere. Ladders are
dictionaries that differ in one thing: their L0 at one site and width, or their width at one site
and nominal L0.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from ._figures import COLOURS, dress, svg

if TYPE_CHECKING:
    from ._record import Record

_COLUMNS = 3


def scope_figures(records: Sequence["Record"]) -> dict[str, str]:
    """The figures of many records, by name: each a complete SVG document."""
    families = _grouped(records, _family)
    out = {
        "pareto": _panels(families, "fvu", "FVU", "Sparsity against reconstruction"),
        "loss": _panels(
            families, "delta_loss", "delta loss (nats/token)",
            "What the model loses when the activation is replaced",
        ),
    }  # fmt: skip
    widths = {k: v for k, v in _grouped(records, _but_width).items() if _differ(v, "d_sae")}
    sparsities = {k: v for k, v in _grouped(records, _but_l0).items() if len(v) > 2}
    if widths or sparsities:
        out["ladders"] = _ladders(widths, sparsities)
    return out


def _family(r: "Record") -> str:
    stream = r.reads.partition(".")[2]
    to = r.writes.partition(".")[2]
    several = "," in r.reads or "-" in r.reads
    name = stream if stream == to else f"{stream} to {to}"
    affine = ", affine" if "affine" in r.address else ""
    return f"{r.kind if several else ''} {name}{affine}".strip()


def _but_width(r: "Record") -> Hashable:
    return r.reads, r.writes, r.nominal_l0, "affine" in r.address


def _but_l0(r: "Record") -> Hashable:
    return r.reads, r.writes, r.d_sae, "affine" in r.address


def _grouped(
    records: Sequence["Record"], key: Callable[["Record"], Hashable]
) -> dict[Any, list["Record"]]:
    out = defaultdict(list)
    for r in records:
        out[key(r)].append(r)
    return dict(out)


def _differ(records: Sequence["Record"], field: str) -> bool:
    return len({getattr(r, field) for r in records}) > 1


def _panels(families: dict[str, list["Record"]], metric: str, label: str, title: str) -> str:
    """A panel for each family: the metric over L0, a line for each site and width."""
    from matplotlib.figure import Figure

    rows = -(-len(families) // _COLUMNS)
    columns = min(len(families), _COLUMNS)
    figure = Figure(figsize=(3.6 * columns + 1.2, 2.7 * rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    shown: dict[str, Any] = {}
    for place, (name, records) in enumerate(sorted(families.items())):
        axes = figure.add_subplot(rows, columns, place + 1)
        dress(axes, name)
        for group in _grouped(records, _but_l0).values():
            ordered = sorted(group, key=lambda r: r.metrics["l0"])
            site = ordered[0].reads.partition(".")[0]
            (line,) = axes.plot(
                [r.metrics["l0"] for r in ordered], [r.metrics[metric] for r in ordered],
                color=_colour(site), marker="o" if len(site) < 3 else "s", markersize=4,
                linewidth=1.2,
            )  # fmt: skip
            shown.setdefault(f"layer {site}" if len(site) < 3 else f"layers {site}", line)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.set_xlabel("L0 (features per token)", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
    figure.legend(
        list(shown.values()), list(shown), loc="outside right upper", fontsize=8, frameon=False
    )
    return svg(figure)


def _ladders(widths: dict[Any, list["Record"]], sparsities: dict[Any, list["Record"]]) -> str:
    """FVU over width at one L0, and over L0 at one width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    figure.suptitle("Ladders", fontsize=12, fontweight="bold", x=0.01, ha="left")
    panels: tuple[tuple[dict, str, Callable[[Any], float], str], ...] = (
        (widths, "by width, at one nominal L0", lambda r: r.d_sae, "features"),
        (sparsities, "by L0, at one width", lambda r: r.metrics["l0"], "L0 (features per token)"),
    )
    for place, (groups, title, x, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, place + 1)
        dress(axes, title)
        for number, records in enumerate(groups.values()):
            ordered = sorted(records, key=x)
            first = ordered[0]
            fixed = f"L0 {first.nominal_l0:g}" if place == 0 else f"{first.d_sae:,} wide"
            axes.plot(
                [x(r) for r in ordered], [r.metrics["fvu"] for r in ordered], marker="o",
                color=COLOURS[number % len(COLOURS)], label=f"{first.reads}, {fixed}",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("FVU (lower is better)", fontsize=9)
        axes.set_ylim(bottom=0)
        if groups:
            axes.legend(fontsize=8, frameon=False)
    return svg(figure)


def _colour(layer: str) -> str:
    return COLOURS[int(layer) % len(COLOURS)] if layer.isdigit() else "#222222"
