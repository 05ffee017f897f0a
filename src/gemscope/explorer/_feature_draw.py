"""What a feature's page draws: histograms as rectangles, contexts as pieces of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import floor, log2
from typing import Any

from markupsafe import Markup, escape

from gemscope.features import shade, shown

WIDTH, HEIGHT = 320, 64
"""Of a histogram's bars, in units of the drawing."""
VIEWS = {"stacked": (10, 6), "snippet": (32, 16), "full": (10**6, 10**6)}
"""Tokens before and after a context's peak that each view shows."""
_BROKEN = {ord("\n"): "⏎\n", ord("\r"): "⏎", ord("\t"): "⇥"}
_FARTHEST = 12
"""Bins under the lowest activation up to which the axis goes on to the threshold."""


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram: rectangles, labels under it, and perhaps a line across."""

    bars: list[dict[str, Any]]
    ticks: list[tuple[float, str, str]]
    """Where, `start`, `middle` or `end`, and what."""
    line: tuple[float, float] | None = None
    """Where, and at what value."""
    zero: float | None = None
    """Where 0 is, if bars stand on both sides of it."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a context: one token that fires, or a run of tokens that do not."""

    text: str
    value: float
    opacity: float
    peak: bool


def rectangles(
    heights: Sequence[int | float], first: int, total: int
) -> list[dict[str, int | float]]:
    """Bars that stand at `first`, `first + 1`, ... of `total` equal places."""
    most, step = max([*heights, 1e-30]), WIDTH / max(1, total)
    out = []
    for i, count in enumerate(heights):
        # A bar of one token among thousands is still to be seen.
        tall = max(HEIGHT * count / most, 1.0) if count else 0.0
        out.append(
            {
                "x": round((first + i) * step, 2), "width": round(max(step - 1, 0.5), 2),
                "y": round(HEIGHT - tall, 2), "height": round(tall, 2), "count": count,
            }
        )  # fmt: skip
    return out


def activation_bars(record: Mapping[str, Any]) -> Bars | None:
    """Activations where the feature fires, on a logarithmic axis that holds its threshold too."""
    histogram, threshold = record["histogram"], record["threshold"]
    if not histogram or not histogram["counts"]:
        return None
    counts, begin = histogram["counts"], histogram["first"]
    place = 4 * log2(threshold) if threshold and threshold > 0 else None
    if place is not None and begin - _FARTHEST <= place < begin:
        begin = floor(place)
    total = histogram["first"] + len(counts) - begin
    bars = rectangles(counts, histogram["first"] - begin, total)
    for i, bar in enumerate(bars):
        low, high = (2 ** ((histogram["first"] + i + k) / 4) for k in (0, 1))
        bar["low"], bar["high"] = low, high
    ends = [2 ** (begin / 4), 2 ** ((begin + total) / 4)]
    ticks = [(0.0, "start", f"{ends[0]:.3g}"), (float(WIDTH), "end", f"{ends[1]:.3g}")]
    inside = place is not None and begin <= place <= begin + total
    line = ((place - begin) * WIDTH / total, threshold) if inside and place is not None else None
    return Bars(bars, ticks, line, extra={"begin": begin, "total": total})


def logit_bars(record: Mapping[str, Any]) -> Bars | None:
    """Direct logits of all tokens; bars right of 0 are of promoted ones."""
    histogram = record["logit_histogram"]
    if not histogram or not histogram["counts"]:
        return None
    low, high, counts = histogram["low"], histogram["high"], histogram["counts"]
    bars, step = rectangles(counts, 0, len(counts)), (high - low) / len(counts)
    for i, bar in enumerate(bars):
        bar["low"], bar["high"] = low + i * step, low + (i + 1) * step
    ticks = [(0.0, "start", f"{low:.3g}"), (float(WIDTH), "end", f"{high:.3g}")]
    zero = -low / (high - low) * WIDTH if low < 0 < high else None
    return Bars(bars, ticks, zero=zero)


def position_bars(record: Mapping[str, Any]) -> Bars | None:
    """Firings per position of the context, in bins that double; BOS stands at 0."""
    counts = record["positions"]
    if not counts or not any(counts):
        return None
    length = record["dictionary"]["context_length"]
    spans = [(2**i, max(2**i, min(2 ** (i + 1), length) - 1)) for i in range(len(counts))]
    rates = [c / (b - a + 1) for c, (a, b) in zip(counts, spans, strict=True)]
    bars = rectangles(rates, 0, len(rates))
    for bar, count, (a, b) in zip(bars, counts, spans, strict=True):
        bar["count"], bar["low"], bar["high"] = count, a, b
    ticks = [(0.0, "start", "1"), (float(WIDTH), "end", f"{spans[-1][1]}")]
    return Bars(bars, ticks)


def headings(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Contexts under what they are: `(kind, interval, contexts)`; kinds top, interval, near."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for context in record["contexts"]:
        by_group.setdefault(context["group"], []).append(context)
    out: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
        ("top", {}, by_group.get("top", []))
    ]
    intervals = record["intervals"] or []
    for number in range(len(intervals), 0, -1):
        found = by_group.get(f"interval {number}", [])
        out.append(("interval", intervals[number - 1], found))
    out.append(("near", {}, by_group.get("near", [])))
    return [part for part in out if part[2]]


def pieces(
    context: Mapping[str, Any], maximum: float, view: str = "snippet", breaks: bool = False
) -> list[Piece]:
    """A context around its peak; silent tokens that stand together are one piece."""
    before, after = VIEWS[view]
    first = max(1, context["position"] - before)
    last = context["position"] + after + 1
    tokens, values = context["tokens"][first:last], context["values"][first:last]
    peak = context["position"] - first
    marks = [(t, v, i == peak) for i, (t, v) in enumerate(zip(tokens, values, strict=True))]
    return _joined(marks, maximum, breaks)


def parts(
    context: Mapping[str, Any], maximum: float, view: str, breaks: bool
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """The same before, at and after the peak, to be stacked in columns."""
    found = pieces(context, maximum, view, breaks)
    at = next((i for i, piece in enumerate(found) if piece.peak), 0)
    return found[:at], found[at : at + 1], found[at + 1 :]


def live_pieces(tokens: Sequence[str], values: Sequence[float], maximum: float) -> list[Piece]:
    """A text that was run, every token a piece of its own where it fires."""
    top = max(values, default=0.0)
    at = list(values).index(top) if top > 0 else -1
    marks = [(t, v, i == at) for i, (t, v) in enumerate(zip(tokens, values, strict=True))]
    return _joined(marks, maximum or top, True)


def run(found: Sequence[Piece]) -> Markup:
    """Pieces one after the other, coloured where the feature fires: hundreds on a page, in a third
    of the time that a template takes.
    """
    out: list[str] = []
    for piece in found:
        text = escape(piece.text)
        if piece.value <= 0 and not piece.peak:
            out.append(text)
            continue
        said = ""
        if piece.value > 0:
            fire = f"background: rgba(var(--fire), {piece.opacity:.2f})"
            said = f' data-v="{piece.value:.3g}" style="{fire}"'
        kind, index = ("f peak", 0) if piece.peak else ("f", -1)
        out.append(f'<span class="{kind}" tabindex="{index}"{said}>{text}</span>')
    return Markup("".join(out))  # noqa: S704 (each text is escaped above)


def excerpt(context: Mapping[str, Any]) -> str:
    """The text of a context around its peak, as it is in the document."""
    first = max(1, context["position"] - 32)
    return "".join(context["tokens"][first : context["position"] + 17])


def until(context: Mapping[str, Any]) -> str:
    """The text of a context up to its peak, which is the last token."""
    first = max(1, context["position"] - 32)
    return "".join(context["tokens"][first : context["position"] + 1])


def _joined(marks: Sequence[tuple[str, float, bool]], maximum: float, breaks: bool) -> list[Piece]:
    out: list[Piece] = []
    for silent, group in groupby(marks, key=lambda m: m[1] <= 0 and not m[2]):
        if silent:
            out.append(Piece(_visible("".join(t for t, _, _ in group), breaks), 0.0, 0.0, False))
            continue
        out += [Piece(_visible(t, breaks), v, shade(v, maximum), peak) for t, v, peak in group]
    return out


def _visible(text: str, breaks: bool) -> str:
    """Line breaks marked, and made if they are to be."""
    return text.translate(_BROKEN) if breaks else shown(text)
