"""`gemscope catalog`: the store's catalog in the formats of others, and theirs in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._show import bar, console, number, print_json

if TYPE_CHECKING:
    from gemscope.exchange import Exported, Imported

catalog = typer.Typer(
    name="catalog",
    help="Take the catalog of a store to other tools, and theirs into it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --to.")]


@catalog.command("export")
def export_command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the catalog store.")],
    addresses: Annotated[list[str], typer.Argument(help="Dictionaries of the store.")],
    to: Annotated[Path, typer.Option(metavar="PATH", help="The file (catalog) or folder to write.")],
    format: Annotated[str, typer.Option(help="catalog, neuronpedia, delphi or parquet.")] = "catalog",
    features: Annotated[str | None, typer.Option(help="These features only, such as 1,5-9.")] = None,
    min_density: Annotated[float, typer.Option(help="Features that fire on this share of tokens or more.")] = 0.0,
    labelled: Annotated[bool, typer.Option("--labelled", help="Features with an explanation or a note.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="catalog: a plain list with the field's keys alone.")] = False,
    vectors: Annotated[bool, typer.Option("--vectors", help="neuronpedia, parquet: decoder vectors too.")] = False,
    window: Annotated[int, typer.Option(help="neuronpedia: tokens of an activation, 0 for whole contexts.")] = 128,
    splits: Annotated[int, typer.Option(help="delphi: files of a module.")] = 5,
    force: Force = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Write dictionaries of a store in a format of the field."""
    from gemscope import exchange
    from gemscope.features import Store

    opened = Store.open(store)
    selection = exchange.Selection(
        features=_features(features), min_density=min_density, labelled=labelled
    )
    options = exchange.Options(bare=bare, vectors=vectors, window=window, splits=splits)
    with _progress() as progress:
        done = exchange.export(
            opened, addresses, to, format=format, selection=selection, options=options,
            force=force, progress=progress,
        )  # fmt: skip
    if json:
        print_json(done.json())
    else:
        _print_exported(done)


@catalog.command("import")
def import_command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the catalog store.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder to read.")],
    format: Annotated[str | None, typer.Option(help="catalog, neuronpedia, delphi, saedashboard or parquet; default: told from the content.")] = None,
    as_: Annotated[list[str] | None, typer.Option("--as", metavar="ADDRESS", help="The dictionary it is of. May be repeated, one a layer.")] = None,
    author: Annotated[str | None, typer.Option(help="catalog: signs labels without an author; default: the file's name.")] = None,
    skip_unknown: Annotated[bool, typer.Option("--skip-unknown", help="Leave out features that the store does not have.")] = False,
    statistics: Annotated[bool, typer.Option("--statistics", help="neuronpedia, saedashboard: keep their statistics and examples too, beside the store's own.")] = False,
    activations: Annotated[Path | None, typer.Option(metavar="FOLDER", help="delphi: write its activations, by feature, to this folder.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Add the labels of a file to a store; nothing that is there is changed."""
    from gemscope import exchange
    from gemscope.features import Store

    opened = Store.open(store)
    if activations is not None:
        if exchange.format_of(path, format) != "delphi":
            raise InputError(f"--activations is for delphi's caches, and {path} is none")
        if as_ is not None and len(as_) > 1:
            raise InputError("a cache is of one dictionary: give --as once")
        kept = exchange.import_delphi(path, activations, as_[0] if as_ else None)
        facts = {
            "format": "delphi", "folder": str(kept.folder), "dictionary": kept.addresses[0],
            "features": kept.d_sae(kept.addresses[0]), "tokens": kept.text.n_tokens,
        }  # fmt: skip
        print_json(facts) if json else print(
            f"{facts['features']:,} features on {facts['tokens']:,} tokens: {kept.folder}"
        )
        return
    done = exchange.import_labels(
        opened, path, format=format, addresses=as_ or (), author=author, skip_unknown=skip_unknown,
        statistics=statistics,
    )  # fmt: skip
    if json:
        print_json(done.json())
    else:
        _print_imported(done)


@catalog.command("validate")
def validate_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder to check.")],
    format: Annotated[str | None, typer.Option(help="catalog, neuronpedia, delphi, saedashboard or parquet; default: told from the content.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Check a file or folder; list every problem with its place."""
    from gemscope import exchange

    kind, problems = exchange.validate(path, format=format)
    if json:
        rows = [{"place": p.place, "problem": p.problem} for p in problems]
        print_json({"path": str(path), "format": kind, "problems": rows})
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{path} is a valid {kind}")
    if problems:
        raise typer.Exit(2)


@catalog.command("merge")
def merge_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Two or more catalogs.")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="The catalog to write.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Make one catalog of several: a human's word wins, and nothing is dropped unsaid."""
    from dataclasses import asdict

    from gemscope import exchange

    done = exchange.merge_catalogs(files, to, force=force)
    if json:
        print_json(asdict(done) | {"to": str(to)})
        return
    for line in (*done.assumed, *map(str, done.conflicts)):
        print(line)
    print(f"{_some(done.features, 'feature')}, {_some(len(done.conflicts), 'conflict')}: {to}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for callbacks of `(what, features done, features in all)`."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<24}"),
        bars.BarColumn(bar_width=30),
        bars.TextColumn("{task.completed:,.0f}/{task.total:,.0f} features"),
        bars.TimeRemainingColumn(),
    )
    tasks: dict[str, bars.TaskID] = {}
    with bar(*columns) as shown:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield update


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _features(text: str | None) -> tuple[int, ...] | None:
    """`1,5-9` as numbers."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or len(part) > 21 or (dash and not last.isdecimal()):
            raise InputError(f"no features {text!r}: give numbers such as 1,5-9")
        stop = int(last) if dash else int(first)
        if stop - int(first) >= 2**24:
            raise InputError(f"{part} are too many features")
        found += range(int(first), stop + 1)
    return tuple(found)


def _print_exported(done: "Exported") -> None:
    to = console()
    to.print(f"{_some(done.features, 'feature')} as {done.format}: {done.to}", soft_wrap=True)
    to.print("[dim]Not in this format:[/dim]")
    for lost in done.lost:
        to.print(f"[dim]  {lost}[/dim]")


def _print_imported(done: "Imported") -> None:
    parts = [
        _some(done.explanations, "new explanation"), _some(done.notes, "new note"),
        f"{done.already:,} already there",
    ]  # fmt: skip
    parts += [f"{done.skipped:,} of unknown features left out"] if done.skipped else []
    parts += [f"{_some(done.empty, 'feature')} without a label"] if done.empty else []
    print(f"{done.format}, {', '.join(done.dictionaries) or 'nothing'}: {', '.join(parts)}")
    if done.kept:
        print(
            f"Kept: statistics of {done.kept['features']:,} features, "
            f"{done.kept['activations']:,} examples"
        )
    for one in done.compared:
        rank, ratio = number(one.rank_correlation, 3), number(one.median_ratio, 3)
        print(
            f"Densities of {one.features:,} features there against here: rank correlation {rank}, "
            f"median ratio {ratio}, {one.dead_there:,} silent only there, {one.dead_here:,} only here"
        )
    for lost in done.lost:
        print(f"Not imported: {lost}")
