"""`gemscope feature`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._show import console, percent, print_json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def feature_command(
    store: Annotated[Path, typer.Argument(help="Folder of the catalog store.")],
    name: Annotated[str, typer.Argument(metavar="ADDRESS/INDEX", help="The feature.")],
    contexts: Annotated[int, typer.Option(help="Contexts shown of the strongest ones, and half as many of the others.", min=0)] = 6,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole record and nothing else.")] = False,
) -> None:  # fmt: skip
    """Show what a feature fires on, promotes, resembles and is called."""
    from gemscope import features, hub

    address, feature = hub.feature_of(name)
    record = features.card(features.Store.open(store), address, feature)
    if html is not None:
        features.write_card(record, html)
    if json:
        print_json(record)
        return
    print_card(record, contexts)
    if html is not None:
        console().print(f"\nThe page: {html}")


def print_card(record: dict[str, Any], contexts: int) -> None:
    """The record for a terminal."""
    to, d = console(), record["dictionary"]
    path = d["reads"] if d["reads"] == d["writes"] else f"{d['reads']} > {d['writes']}"
    to.print(f"[bold]Feature {record['feature']}[/bold] of {record['address']}, {path}")
    print_said(record)
    if not record["count"]:
        to.print(f"It never fired on the {d['tokens']:,} tokens it was measured on.")
        return
    to.print(
        f"\nfires on {percent(record['density'])} of {d['tokens']:,} tokens, in "
        f"{record['documents']:,} of {d['documents']:,} documents · max {record['max']:.3g} · mean "
        f"where it fires {record['mean_active']:.3g} · threshold {record['threshold']:.3g}"
    )
    histogram = record["histogram"]
    low = 2 ** (histogram["first"] / 4)
    high = 2 ** ((histogram["first"] + len(histogram["counts"])) / 4)
    to.print(f"activations  {low:.3g} {_spark(histogram['counts'])} {high:.3g}  (logarithmic)")
    if record["output_score"] is not None:
        to.print(f"output score {record['output_score']:.3f}: how far amplifying it brings its own "
                 "tokens out of a neutral prompt")  # fmt: skip
    to.print()
    to.print(_tokens(record))
    from gemscope.features import grouped

    for heading, found in grouped(record):
        some = found[: contexts if heading.startswith("Top") else -(-contexts // 3)]
        if some:
            to.print(f"\n[bold]{heading}[/bold]")
        for context in some:
            to.print(_line(context, record["max"]), no_wrap=True, overflow="ellipsis")
    to.print()
    to.print(_related(record))


def print_brief(record: dict[str, Any], contexts: int) -> None:
    """What it is called, and where it fires most strongly."""
    to, d = console(), record["dictionary"]
    to.print(f"[bold]Feature {record['feature']}[/bold], on {percent(record['density'])} of "
             f"{d['tokens']:,} tokens")  # fmt: skip
    print_said(record)
    for context in [c for c in record["contexts"] if c["group"] == "top"][:contexts]:
        to.print(_line(context, record["max"]), no_wrap=True, overflow="ellipsis")


def print_said(record: dict[str, Any]) -> None:
    """Notes, then explanations with their scores."""
    from rich.text import Text

    to = console()
    for note in record["notes"]:
        to.print(Text.assemble((note["text"], "bold"), f"  (note {note['author']})".rstrip()))
    for e in record["explanations"]:
        line = Text(e["text"], style="bold orange3")
        scores = [
            f"{s['name']} {s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}]"
            + (f", null {s['null']:.2f}" if s["null"] is not None else "")
            for s in e["scores"]
        ]
        line.append(f"  {e['author']}: {'; '.join(scores) or 'not scored'}", style="dim")
        to.print(line)
    if not record["notes"] and not record["explanations"]:
        to.print("[dim]Not explained yet: gemscope explain does.[/dim]")


def _spark(counts: list[int]) -> str:
    most = max(counts)
    return "".join(_EIGHTHS[-(-8 * c // most)] for c in counts)


def _tokens(record: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from gemscope.features import marked

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    columns = [("fires on", "tokens"), ("before", "before"), ("after", "after"),
               ("promotes", "promoted"), ("suppresses", "suppressed")]  # fmt: skip
    columns = [(heading, name) for heading, name in columns if record[name]]
    for heading, _ in columns:
        table.add_column(heading)
    for row in range(6):
        cells = []
        for _, name in columns:
            if row >= len(record[name]):
                cells.append(Text())
                continue
            token = record[name][row]
            figure = f"{token['share']:.0%}" if "share" in token else f"{token['logit']:+.2f}"
            cells.append(Text.assemble(marked(token["token"]), (f" {figure}", "dim")))
        table.add_row(*cells)
    return table


def _line(context: dict[str, Any], maximum: float) -> "Text":
    from rich.text import Text

    line = Text(f"{context['value']:7.3g}  ", style="dim")
    return line.append_text(_coloured(context, maximum))


def _coloured(context: dict[str, Any], maximum: float) -> "Text":
    from rich.style import Style
    from rich.text import Text

    from gemscope.features import shade, window

    line = Text()
    for token, value in window(context, 14, 6):
        part = shade(value, maximum)
        if not part:
            line.append(token)
            continue
        r, g, b = (round(250 + (z - 250) * part) for z in (216, 112, 42))
        line.append(token, style=Style(color="black", bgcolor=f"rgb({r},{g},{b})"))
    return line


def _related(record: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for heading in ("nearest directions (cosine)", "fires together with (phi)"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=1)
    for row in range(5):
        cells = []
        for name, figure in (("neighbours", "cosine"), ("together", "phi")):
            found = record[name][row : row + 1]
            cells += [f"{n['feature']} ({n[figure]:.2f}) {n['explanation'] or ''}" for n in found]
            cells += [""] * (1 - len(found))
        table.add_row(*cells)
    return table
