"""`gemscope output-score`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._show import console, number, print_json, token_progress

if TYPE_CHECKING:
    from gemscope.steering import Scored


def output_score_command(
    store: Annotated[Path, typer.Argument(help="Folder of the catalog store.")],
    addresses: Annotated[list[str] | None, typer.Argument(help="Dictionaries; default: all of the store.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A neutral prompt. May be repeated; default: four that suit the model.")] = None,
    strength: Annotated[float, typer.Option(help="How far a feature is amplified, as a multiple of its maximum.")] = 3.0,
    force: Annotated[bool, typer.Option("--force", help="Measure again what has a score.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list and nothing else.")] = False,
) -> None:  # fmt: skip
    """Measure which features bring out their own tokens: those worth steering with.

    Scores go into the store as they come: stopped in any way, the same command goes on.
    """
    from gemscope import steering
    from gemscope.features import Stopped, Store

    opened = Store.open(store)
    try:
        with token_progress(unit="features") as progress:
            found = steering.score_store(
                opened, addresses or (), prompts=prompt or None, strength=strength, again=force,
                device=device, dtype=dtype, progress=progress,
            )  # fmt: skip
    except Stopped as stopped:
        print(f"gemscope: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None
    if json:
        print_json([one.json() for one in found])
        return
    _print(found, store)


def _print(found: "list[Scored]", store: Path) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("dictionary", overflow="fold")
    for heading in ("features", "scored", "before", "silent", "median score"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(
            one.address, f"{one.features:,}", f"{one.scored:,}", f"{one.before:,}",
            f"{one.silent:,}", number(one.median, 3),
        )  # fmt: skip
    to = console()
    to.print(table)
    for one in found:
        if one.reason is not None:
            to.print(f"{one.address} has no scores: {one.reason}.", markup=False)
    to.print(f"\nWorth steering with: gemscope search {store} --where 'output_score > 0.1'")
