"""`gemscope look`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.features import Look


def look(
    text: Annotated[str, typer.Argument(help="The text to read.")],
    sae: Annotated[str, typer.Option("--sae", help="Catalog address, local folder, or owner/repo/path of the dictionary.")],
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionary's own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    top: Annotated[int, typer.Option(help="Features shown per token.", min=1)] = 5,
    feature: Annotated[int | None, typer.Option(help="With --plot: this feature and its threshold.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure: FILE.svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Show the strongest features of every token of a text."""
    from gemscope import features, hub
    from gemscope.lm import load_model

    if feature is not None and plot is None:
        raise InputError("--feature draws one feature: give --plot FILE with it")
    entry = hub.obtain(hub.locate(sae, given(reads, writes, model)))
    dictionary = hub.build(entry)
    if plot is not None:
        features.check_plot(dictionary, plot, feature)
    lm = load_model(model or entry.model)
    lm.check(dictionary)
    seen = features.look(lm, dictionary.to(lm.device), text)
    if plot is not None:
        features.plot_look(seen, plot, feature=feature)
    if json:
        print_json(seen.json(top))
        return
    _print(seen, top)
    if plot is not None:
        console().print(f"\nThe figure: {plot}")


def _print(seen: "Look", top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("token")
    table.add_column("L0", justify="right")
    table.add_column("strongest features (feature: value)")
    strongest = max((f["value"] for row in seen.json(1)["features"] for f in row), default=1.0)
    for token, pairs, counted, l0 in zip(
        seen.shown, seen.features.top(top), seen.counted, seen.l0, strict=True
    ):
        if not counted:
            table.add_row(Text(token, style="dim"), "", Text("does not count", style="dim"))
            continue
        line = Text()
        for index, value in pairs:
            line.append(f"{seen.name(index)}: {value:.2f}", style=_shade(value / strongest))
            line.append("  ")
        table.add_row(token, str(l0), line)
    console().print(table)


def _shade(share: float) -> Any:
    """A colour from grey to orange."""
    from rich.style import Style

    low, high = (120, 120, 120), (235, 110, 30)
    share = min(max(share, 0.0), 1.0)
    r, g, b = (round(a + (z - a) * share) for a, z in zip(low, high, strict=True))
    return Style(color=f"rgb({r},{g},{b})", bold=share > 0.6)
