"""`gemscope compare`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, print_json, token_progress
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.relate import Comparison, Said


def compare_command(
    address: Annotated[str, typer.Argument(help="Catalog address, local folder, or owner/repo/path of the dictionary.")],
    a: Annotated[str, typer.Option("--a", metavar="NAME=SOURCE", help="One text: a file, folder, pattern, 'miniature', 'python', a preset (code, docstrings, tests), or dataset:OWNER/NAME[:SPLIT[:COLUMN]].")],
    b: Annotated[list[str], typer.Option("--b", metavar="NAME=SOURCE", help="The other; given several times, each is compared with a.")],
    tokens: Annotated[int, typer.Option(help="Tokens of each text, at most.", min=1)] = 100_000,
    context: Annotated[int, typer.Option(help="Tokens of a context, BOS included.")] = 256,
    q: Annotated[float, typer.Option("--q", help="False discovery rate up to which a difference is told.", min=0.0, max=1.0)] = 0.05,
    top: Annotated[int, typer.Option(help="Features shown for each side.", min=1)] = 10,
    store: Annotated[Path | None, typer.Option(help="A store of gemscope index: explanations come from it.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the activations in; with it a stopped command goes on.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every feature as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw density against density: .svg, .png or .pdf.")] = None,
    details: Annotated[bool, typer.Option("--details", help="With --json: also p, t, effect sizes, counts; contexts and promoted tokens of the --top of each side.")] = False,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionary's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of which contexts are taken.")] = 0,
    reads: Reads = None,
    writes: Writes = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list and nothing else.")] = False,
) -> None:  # fmt: skip
    """Compare what fires in two texts, with documents as the units."""
    from gemscope import hub, relate
    from gemscope.features import Stopped
    from gemscope.lm import load_model

    _check(plot, csv, details, json)
    entry = hub.obtain(hub.locate(address, given(reads, writes, model)))
    catalog = None if store is None else _catalog(store, entry.address)
    sides = relate.read_sides(a, b)
    lm = load_model(model or entry.model, device=device, dtype=dtype)
    sae = hub.build(entry).to(lm.device)
    lm.check(sae)
    try:
        with token_progress() as progress, relate.collected(
            lm, sae, sides, keep, address=entry.address, tokens=tokens, context=context, seed=seed,
            progress=progress,
        ) as found:  # fmt: skip
            made = relate.compare_sides(found, entry.address, sides)
            wanted = [f for one in made for side in "ab" for f in one.more_in(side, top, q=1.0)]
            said = relate.say(lm, sae, found, entry.address, wanted, made, catalog)
    except Stopped as stopped:
        lost = "stopped; nothing is kept without --keep FOLDER, with which the command goes on"
        print(f"gemscope: {lost if keep is None else stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None
    if csv is not None:
        relate.write_csv(made, csv, {f: one.flat() for f, one in said.items()})
    if plot is not None:
        relate.plot_comparisons(made, plot, q=q)
    if json:
        print_json(relate.comparison_json(made, said if details else None))
        return
    for one in made:
        _print(one, said, top, q)
    for what, file in (("figure", plot), ("CSV", csv)):
        if file is not None:
            console().print(f"The {what}: {file}")


def _check(plot: Path | None, csv: Path | None, details: bool, json: bool) -> None:
    from gemscope import relate

    if plot is not None:
        relate.check_figure(plot)
    if csv is not None and not csv.absolute().parent.is_dir():
        raise InputError(f"{csv} cannot be written: there is no folder {csv.absolute().parent}")
    if details and not json:
        raise InputError("--details adds to what --json prints; give --json with it")


def _catalog(store: Path, address: str) -> Any:
    from gemscope.features import Store

    found = Store.open(store)
    found.dictionary(address)
    return found


def _print(one: "Comparison", said: "dict[int, Said]", top: int, q: float) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    sides = " and ".join(
        f"{s.name} ({s.tokens:,} tokens of {s.documents:,} documents)" for s in (one.a, one.b)
    )
    told = {side: one.more_in(side, q=q) for side in "ab"}
    out.print(f"{one.address}: {sides}", markup=False)
    out.print(
        f"{one.fires.sum():,} of {len(one.q):,} features fire; at a false discovery rate of {q:g}, "
        f"{len(told['a']):,} are denser in {one.a.name} and {len(told['b']):,} in {one.b.name}.\n",
        markup=False,
    )
    for side in "ab":
        name = getattr(one, side).name
        # Surest first, so those that are told come before those that are not.
        shown = one.more_in(side, top, q=1.0)
        if not shown:
            continue
        few = f" (those with q above {q:g} could be chance)" if len(told[side]) < len(shown) else ""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0),
                      title=f"Denser in {name}{few}", title_justify="left", title_style="bold")  # fmt: skip
        heads = ("feature", one.a.name, one.b.name, "log odds", "95% interval", "q")
        rows = [_cells(one.row(feature)) for feature in shown]
        for head, *cells in zip(heads, *rows, strict=True):
            # Rich would squeeze figures to make room for words.
            width = max(map(len, (head, *cells)))
            table.add_column(Text(head), justify="right", min_width=width)
        table.add_column(
            "explanation, or the strongest token in context", no_wrap=True, overflow="ellipsis"
        )
        for feature, cells in zip(shown, rows, strict=True):
            table.add_row(*cells, Text(said[feature].line(name)))
        out.print(table)
        out.print()


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["feature"]),
        _share(row["density_a"]),
        _share(row["density_b"]),
        f"{row['log_odds']:+.2f}",
        f"{row['low']:+.2f} to {row['high']:+.2f}",
        number(row["q"], 2),
    ]


def _share(density: float) -> str:
    return "0" if density == 0 else f"{density:.2%}" if density >= 0.001 else f"{density:.1e}"
