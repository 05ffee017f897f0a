"""Everything known of one feature, as one record and as one page."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gemscope.activations import write_whole
from gemscope.errors import InputError

from ._pieces import marked, shown
from ._search import described
from ._store import Store

Said = Callable[[Iterable[tuple[str, int]]], dict[tuple[str, int], tuple[str, float | None]]]
"""What features are called, as `described` has it of one store."""


def card(store: Store, address: str, feature: int, said_of: Said | None = None) -> dict[str, Any]:
    """The whole record of a feature: statistics, contexts with tokens, what it is said to be.

    A server that keeps what features are called gives `said_of`; it is asked instead of the store.
    """
    known = store.dictionary(address)
    row = store.feature(address, feature)
    pieces, text = store.pieces(address), store.text(address)
    contexts = []
    for found in store.contexts(address, feature):
        number = found["context"]
        ids = text.ids[text.offsets[number] : text.offsets[number + 1]].tolist()
        values = [0.0] * len(ids)
        for position, value in zip(found["positions"], found["values"], strict=True):
            values[position] = value
        document = int(text.document[number])
        contexts.append(
            {
                **{n: found[n] for n in ("group", "rank", "value", "position", "share")},
                "document": text.paths[document],
                "source": text.sources[text.source[document]],
                "tokens": pieces(ids),
                "values": values,
            }
        )
    others = [(address, n["feature"]) for n in (*row["together"], *row["neighbours"])]
    said = described(store, others) if said_of is None else said_of(others)
    for name in ("together", "neighbours"):
        row[name] = [
            n | {"explanation": said.get((address, n["feature"]), (None,))[0]} for n in row[name]
        ]
    return {
        "address": address,
        **{k: v for k, v in row.items() if k != "dictionary"},
        "explanations": [e.json() for e in store.explanations(address, feature)],
        "notes": [n.json() for n in store.notes(address, feature)],
        "contexts": contexts,
        "dictionary": {k: v for k, v in known.items() if k not in ("run", "collected")},
    }


def window(context: dict[str, Any], before: int = 16, after: int = 8) -> list[tuple[str, float]]:
    """Tokens around a context's peak, made visible, each with the feature's activation."""
    first = max(1, context["position"] - before)
    last = context["position"] + after + 1
    pairs = zip(context["tokens"][first:last], context["values"][first:last], strict=True)
    return [(shown(token), value) for token, value in pairs]


def write_card(record: dict[str, Any], file: Path) -> None:
    """Write the record as one HTML page that needs nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gemscope.features", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"window": window, "shade": shade, "marked": marked, "bars": bars}
    page = environment.get_template("feature.html").render(**record, groups=grouped(record))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def grouped(record: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The contexts under their headings: top, intervals from the strongest down, near misses."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for context in record["contexts"]:
        by_group.setdefault(context["group"], []).append(context)
    out = [("Top activations", by_group.pop("top", []))]
    for number in range(len(record["intervals"]), 0, -1):
        found = by_group.pop(f"interval {number}", [])
        here = record["intervals"][number - 1]
        out.append(
            (
                f"Interval {here['low']:.3g} to {here['high']:.3g}: {here['share']:.0%} of its "
                f"firings, {here['mass']:.0%} of its activation",
                found,
            )
        )
    out.append(
        ("Near misses: it stays silent, and comes closest to firing", by_group.pop("near", []))
    )
    return [(heading, found) for heading, found in out if found]


def shade(value: float, maximum: float) -> float:
    """Opacity of a token: on the scale of the feature's own maximum, so weak ones look weak."""
    from math import log10

    if value <= 0 or maximum <= 0:
        return 0.0
    return 0.05 + 0.95 * log10(1 + 9 * min(value / maximum, 1.0))


def bars(counts: list[int], width: int = 320, height: int = 64) -> list[dict[str, float]]:
    """Bars of a histogram as rectangles of a drawing of `width` by `height`."""
    most, step = max([1, *counts]), width / max(1, len(counts))
    return [
        {
            "x": round(i * step, 2), "width": round(max(step - 1, 0.5), 2),
            "y": round(height * (1 - c / most), 2), "height": round(height * c / most, 2),
            "count": c,
        }
        for i, c in enumerate(counts)
    ]  # fmt: skip
