"""`gemscope index`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._addresses import each_address
from ._show import console, number, percent, print_json, token_progress
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.features import Source, Subject
    from gemscope.lm import LanguageModel


def index_command(
    addresses: Annotated[list[str], typer.Argument(help="Catalog addresses, local folders, owner/repo/path, or a pattern of catalog addresses, 'miniature/*'.")],
    to: Annotated[Path, typer.Option(metavar="STORE", help="Folder of the catalog store; made if it is not there.")],
    text: Annotated[list[str] | None, typer.Option(help="[NAME=]TEXT: a file, folder, glob pattern, or code, docstrings, tests, miniature, python. May be repeated: densities are kept apart.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="[NAME=]OWNER/DATA[:SPLIT[:COLUMN]] of the hub. May be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most, spread over the text.")] = 200_000,
    context: Annotated[int, typer.Option(help="Tokens of a context, BOS included.")] = 256,
    keep_activations: Annotated[bool, typer.Option("--keep-activations", help="Keep every activation by feature: rules, clusters and tracking need no model then.")] = False,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionaries' own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    seed: Annotated[int, typer.Option(help="Seed of which contexts are read and which examples are kept.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    other_model: Annotated[bool, typer.Option("--other-model", help="Attach to a model it was not made for.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Measure every feature of dictionaries in one pass; run it again to go on."""
    from gemscope import features

    settings = features.Settings(
        tokens=tokens, context=context, seed=seed, keep_activations=keep_activations
    )
    said = given(reads, writes, model)
    lm, subjects, name = subjects_of(
        addresses, said, model, device=device, dtype=dtype, other_model=other_model
    )
    began = time.monotonic()
    sources = features.sources_of(text or (), dataset or (), tokens=tokens)
    store = features.Store.create(to)
    if not json:
        _announce(subjects, sources, tokens)
    rows = run(lm, subjects, sources, store, settings, name)
    if json:
        print_json(rows)
        return
    _print(rows, to, tokens, time.monotonic() - began)


def subjects_of(
    addresses: Sequence[str],
    said: Any,
    model: str | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    other_model: bool = False,
) -> "tuple[LanguageModel, list[Subject], str]":
    """The model, what to measure on it, and the name that loads the model."""
    from gemscope import features, hub

    entries = [hub.obtain(hub.locate(address, said)) for address in each_address(addresses)]
    models = sorted({entry.model for entry in entries})
    if model is None and len(models) > 1:
        raise InputError(f"these dictionaries belong to several models: {', '.join(models)}; "
                         "index one model's at a time")  # fmt: skip
    from gemscope.lm import load_model

    name = model or models[0]
    lm = load_model(name, device=device, dtype=dtype)
    subjects = []
    for entry in entries:
        sae = hub.build(entry).to(lm.device)
        lm.check_widths(sae) if other_model else lm.check(sae)
        subjects.append(
            features.Subject(
                address=entry.address, sae=sae, digest=hub.digest(entry), nominal_l0=entry.l0
            )
        )
    return lm, subjects, name


def run(
    lm: "LanguageModel",
    subjects: "list[Subject]",
    sources: "list[Source]",
    store: Any,
    settings: Any,
    name: str,
) -> list[dict[str, Any]]:
    """Index with a bar; a signal ends it with a sentence and the signal's code."""
    from gemscope import features

    try:
        with token_progress({"measuring features": "features"}) as report:
            return features.index(
                lm, subjects, sources, store, settings, model_name=name, progress=report
            )
    except features.Stopped as stopped:
        print(f"gemscope: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None


def _announce(subjects: "list[Subject]", sources: "list[Source]", tokens: int) -> None:
    from gemscope import features

    need = features.estimate([s.sae for s in subjects], tokens)
    documents = sum(len(source.documents) for source in sources)
    console(stderr=True).print(
        f"{len(subjects)} dictionaries, {sum(s.sae.d_sae for s in subjects):,} features, up to "
        f"{tokens:,} tokens of {documents:,} documents.\n[dim]At most about "
        f"{need.memory / 2**30:.1f} GiB of memory beside model and dictionaries, and "
        f"{need.disk / 2**20:,.0f} MiB of disk for their activations.[/dim]"
    )


def _print(rows: list[dict[str, Any]], to: Path, asked: int, seconds: float) -> None:
    from rich.table import Table

    from gemscope import features

    store = features.Store.open(to)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("dictionary", overflow="fold")
    for heading in ("features", "L0 (nominal)", "silent", "over 10%"):
        table.add_column(heading, justify="right")
    for row in rows:
        density = store.features(row["address"], ["density"])["density"].to_numpy()
        table.add_row(
            row["address"],
            f"{row['d_sae']:,}",
            f"{number(row['l0'], 3)} ({number(row['nominal_l0'])})",
            percent(float((density == 0).mean())),
            percent(float((density > 0.1).mean())),
        )
    to_console = console()
    to_console.print(table)
    read, first = rows[0]["tokens"], rows[0]["address"]
    short = f" (the text has no more than these of the {asked:,} asked)" if read < asked else ""
    to_console.print(
        f"[dim]{read:,} tokens of {rows[0]['documents']:,} documents{short}, {seconds:.0f} s. "
        "Silent: features that never fired here. Over 10%: on more than a tenth of the "
        "tokens.[/dim]"
    )
    best = int(store.features(first, ["density"])["density"].to_numpy().argmax())
    to_console.print(
        f"\nThe store: {to}\nNext: gemscope feature {to} {first}/{best}\n"
        f"      gemscope search {to} --promotes return"
    )
