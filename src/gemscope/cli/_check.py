"""`gemscope check`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._show import console, number, print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.evaluate import Row
    from gemscope.hub import Entry


def check_command(
    address: Annotated[str, typer.Argument(help="A catalog address, a local folder, or owner/repo/path.")],
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionary's own.")] = None,
    text: Annotated[str | None, typer.Option(help="A text file, folder or glob pattern; default: a short English text, of the miniature its held-out text.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    other_model: Annotated[bool, typer.Option("--other-model", help="Attach to a model it was not made for.")] = False,
    reads: Reads = None,
    writes: Writes = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:  # fmt: skip
    """Check an artefact against what was published.

    The exit code is 1 if it does not fit.
    """
    from gemscope import corpus, formats, hub
    from gemscope import evaluate as ev
    from gemscope.lm import load_model

    entry = hub.obtain(hub.locate(address, given(reads, writes, model)))
    sae = hub.build(entry)
    lm = load_model(model or entry.model, device=device, dtype=dtype)
    lm.check_widths(sae) if other_model else lm.check(sae)
    if text is not None:
        documents = corpus.read_text(text)
    elif entry.release == hub.BUNDLED_RELEASE:
        documents = corpus.read_text(corpus.BUNDLED)
    else:
        documents = [ev.check_text()]
    assert entry.path is not None
    norm = formats.inspect(entry.path).input_norm
    rows = ev.check(lm, sae.to(lm.device), entry, documents, input_norm=norm)
    good = all(row.fits for row in rows)
    if json:
        print_json({"address": entry.address, "fits": good, "figures": [_json(r) for r in rows]})
    else:
        _print(entry, rows, good)
    if not good:
        raise typer.Exit(1)


def _json(row: "Row") -> dict[str, Any]:
    low, high = (None if abs(v) == float("inf") else v for v in (row.low, row.high))
    return {"name": row.name, "measured": row.measured, "expected": row.expected, "low": low,
            "high": high, "fits": row.fits, "why": row.why}  # fmt: skip


def _print(entry: "Entry", rows: list["Row"], good: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading, side in (("figure", "left"), ("measured", "right"), ("expected", "right"),
                          ("fits from", "right"), ("to", "right"), ("", "left"), ("why", "left")):  # fmt: skip
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for row in rows:
        verdict = "[green]fits[/green]" if row.fits else "[red]does not fit[/red]"
        table.add_row(
            row.name, number(row.measured), number(row.expected), number(row.low),
            "-" if row.high == float("inf") else number(row.high), verdict, row.why,
        )  # fmt: skip
    to = console()
    to.print(f"[bold]{entry.address}[/bold] at {entry.reads} of {entry.model}\n")
    to.print(table)
    to.print(
        "\nIt does what was published, as far as this text can tell."
        if good
        else "\nIt does not do what was published: see that model, site and files are the right "
        "ones, and that BOS is in the input."
    )
