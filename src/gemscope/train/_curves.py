"""The curves of a run over its tokens, readable with one artefact and with sixty.

A few artefacts share four large axes. More are laid out in rows, one for each site, whose colours
are widths and targets; where that would be too many rows, a row is what artefacts of all layers
share, and the colour is the layer. Each row has its own legend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemscope.evaluate import COLOURS, dress, svg
from gemscope.sites import each

from ._config import Artefact
from ._read import width

_FEW, _ROWS, _POINTS = 8, 12, 160
_SETTLED = 0.05
"""Share of a run after which a curve has to be on the axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What was measured of an artefact."""

    artefact: Artefact
    lines: list[dict]
    looks: dict[int, float]
    """Delta loss by tokens trained on."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values, no more than a page can show."""
        if key == "delta_loss":
            return [float(t) for t in self.looks], list(self.looks.values())
        known = [line for line in self.lines if line.get(key) is not None]
        step = max(1, -(-len(known) // _POINTS))
        some = known[(len(known) - 1) % step :: step]  # the last one among them
        return [float(line["tokens"]) for line in some], [float(line[key]) for line in some]


_METRICS = {
    "fvu": "FVU",
    "l0": "L0 (dashed: target)",
    "dead": "dead features",
    "delta_loss": "delta loss (nats/token)",
}


def curves(found: Sequence[Curve]) -> str:
    """All curves in one SVG document."""
    keys = [k for k in _METRICS if k != "delta_loss" or any(c.looks for c in found)]
    if len(found) <= _FEW:
        labelled = [(c.artefact.name, c) for c in found]
        return _large(_coloured(labelled), keys)
    rows = _layout(found)
    return _large(rows[0][1], keys) if len(rows) == 1 else _rows(rows, keys)


Marked = list[tuple[str, Curve, str]]
"""Curves, each with a label and a colour."""
Row = tuple[str, Marked]
"""The same under a heading."""


def _coloured(labelled: Sequence[tuple[str, Curve]]) -> Marked:
    last = len(labelled) - 1
    few = last < len(COLOURS)
    return [
        (label, curve, COLOURS[i] if few else _shade(i, 0, last))
        for i, (label, curve) in enumerate(labelled)
    ]


def _layout(found: Sequence[Curve]) -> list[Row]:
    told = _labels(found)
    by_site = _grouped(found, lambda c: _site(c.artefact))
    if max(map(len, by_site.values())) > _FEW:
        finer = _grouped(found, lambda c: f"{_site(c.artefact)}   {width(c.artefact.d_sae)}")
        by_site = finer if len(finer) <= _ROWS else by_site
    if len(by_site) <= _ROWS:
        return [
            (site, _coloured([(told[c.artefact.name], c) for c in group]))
            for site, group in by_site.items()
        ]
    alike = _grouped(found, lambda c: f"{_streams(c.artefact)}   {told[c.artefact.name]}".strip())
    if len(alike) > 2 * _ROWS:
        alike = _grouped(found, lambda c: _streams(c.artefact))
    layers = [_layer(c) for c in found]
    low, high = min(layers), max(layers)
    return [
        (heading, [(f"layer {_layer(c)}", c, _shade(_layer(c), low, high)) for c in g])
        for heading, g in alike.items()
    ]


def _grouped(found: Sequence[Curve], key: Callable[[Curve], str]) -> dict[str, list[Curve]]:
    out: dict[str, list[Curve]] = {}
    for curve in found:
        out.setdefault(key(curve), []).append(curve)
    return out


def _site(a: Artefact) -> str:
    return str(a.reads) if a.reads == a.writes else f"{a.reads} > {a.writes}"


def _streams(a: Artefact) -> str:
    reads, writes = each(a.reads)[0].stream, each(a.writes)[0].stream
    own = str(reads) if reads == writes else f"{reads} > {writes}"
    return own if a.kind in ("sae", "transcoder") else f"{a.kind} {own}"


def _layer(curve: Curve) -> int:
    return each(curve.artefact.writes)[0].layer


def _labels(found: Sequence[Curve]) -> dict[str, str]:
    """What tells artefacts of a site from each other: the facts in which the run's differ."""
    facts: list[Callable[[Artefact], str]] = [
        lambda a: "" if a.activation == "jumprelu" else a.activation,
        lambda a: width(a.d_sae),
        lambda a: f"L0 {a.l0:g}",
        lambda a: "affine" if a.affine else "",
        lambda a: "matryoshka" if a.prefixes else "",
        lambda a: f"seed {a.seed}",
    ]
    artefacts = [c.artefact for c in found]
    telling = [f for f in facts if len({f(a) for a in artefacts}) > 1]
    out = {a.name: ", ".join(t for f in telling if (t := f(a))) for a in artefacts}
    for group in _grouped(found, lambda c: _site(c.artefact)).values():
        names = [c.artefact.name for c in group]
        if len({out[n] for n in names}) < len(names):
            out |= {n: n for n in names}
    return out


def _shade(layer: int, low: int, high: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # Its yellow end is too light for lines on white.
    return to_hex(colormaps["viridis"](0.92 * (layer - low) / max(high - low, 1)))


def _large(marked: Marked, keys: Sequence[str]) -> str:
    """Axes two abreast, one legend below."""
    from matplotlib.figure import Figure

    columns = 1 if max(len(label) for label, *_ in marked) > 60 else 2
    legend = 0.22 * -(-len(marked) // columns) if len(marked) > 1 else 0.0
    figure = Figure(figsize=(12.0, 6.4 + legend), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, key in zip(grid.flat, _METRICS, strict=True):
        if key not in keys:
            axes.set_axis_off()
            continue
        dress(axes, _METRICS[key])
        _draw(axes, key, marked)
        axes.set_xlabel("tokens", fontsize=9)
    if len(marked) > 1:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False
        )
    return svg(figure)


def _rows(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A row of axes for each group, its legend at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 2.1 * len(rows) + 0.3), layout="constrained")
    ratios = [*([1.0] * len(keys)), 0.7]
    grid = figure.subplots(
        len(rows), len(keys) + 1, squeeze=False, gridspec_kw={"width_ratios": ratios}
    )
    for (heading, marked), line in zip(rows, grid, strict=True):
        for axes, key in zip(line, keys, strict=False):
            dress(axes, "")
            _draw(axes, key, marked)
            axes.tick_params(labelsize=8.5)
            axes.set_ylabel(_METRICS[key], fontsize=9)
            if line is grid[-1]:
                axes.set_xlabel("tokens", fontsize=9)
        line[0].set_title(heading, fontsize=10.5, loc="left", fontweight="bold")
        _legend(line[-1], *line[0].get_legend_handles_labels())
    return svg(figure)


def _legend(axes: Any, handles: list, labels: list[str]) -> None:
    axes.set_axis_off()
    known = dict(zip(labels, handles, strict=True))
    if len(known) > 2 * _FEW and all(label.startswith("layer ") for label in known):
        order = sorted(known, key=lambda label: int(label.split()[1]))
        last = len(order) - 1
        known = {order[i * last // 6]: known[order[i * last // 6]] for i in range(7)}
    columns = 2 if len(known) > _FEW and max(map(len, known)) < 12 else 1
    size = 8.5 if max(map(len, known)) < 24 and len(known) <= _FEW * columns else 7.5
    axes.legend(
        known.values(), known, loc="upper left", fontsize=size, frameon=False, ncols=columns,
        borderaxespad=0, handlelength=1.2, labelspacing=0.3, columnspacing=0.8,
    )  # fmt: skip


def _draw(axes: Any, key: str, marked: Marked) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    top, end = 0.0, 1.0
    for label, curve, colour in marked:
        x, y = curve.series(key)
        if key == "l0" and x:
            target = curve.artefact.l0
            axes.axhline(target, color=colour, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.8)
        looked = key == "delta_loss"
        axes.plot(
            x, y, "o-" if looked else "-", color=colour, linewidth=1.3, markersize=3.5,
            label=label, clip_on=not looked,
        )  # fmt: skip
        end = max(end, *x) if x else end
        top = max([top, *(v for t, v in zip(x, y, strict=True) if t >= _SETTLED * x[-1])])
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.xaxis.get_major_locator().set_params(nbins=4)
    match key:
        case "l0":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        case "dead":
            axes.set_ylim(0, max(1.08 * top, 0.02))
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        case "fvu":
            axes.set_ylim(0, min(1.08 * top, 1.08) or 1.0)
        case _:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _tokens(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
