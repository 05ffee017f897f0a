"""`gemscope eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._addresses import each_address
from ._show import console, number, percent, print_json, token_progress
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from rich.table import Table

    from gemscope.corpus import Document
    from gemscope.evaluate import Record, Settings


def evaluate_command(
    addresses: Annotated[list[str], typer.Argument(help="Catalog addresses, local folders, owner/repo/path, or a pattern of catalog addresses, 'miniature/*'.")],
    model: Annotated[str | None, typer.Option(help="Model to splice into; default: the dictionary's own.")] = None,
    text: Annotated[str | None, typer.Option(help="A text file, folder or glob pattern; default: the bundled held-out text.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set of the hub, OWNER/NAME[:SPLIT[:COLUMN]].")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, at most.")] = 65_536,
    context: Annotated[int, typer.Option(help="Tokens of a context, BOS included.")] = 1_024,
    batch: Annotated[int | None, typer.Option(help="Contexts of a batch; default: by memory.")] = None,
    layers: Annotated[str | None, typer.Option(help="Of a multi-layer model: splice these layers for the main figures, such as 7,13; default: all together.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    count_prefix: Annotated[bool, typer.Option("--count-prefix", help="Count the tokens that begin a user's turn in a chat.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of intervals and of the random dictionary.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    other_model: Annotated[bool, typer.Option("--other-model", help="Attach to a model it was not made for.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("reports"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Evaluate dictionaries in their model; write a report."""
    from gemscope.evaluate import Settings

    if text is not None and dataset is not None:
        raise InputError("both --text and --dataset were given; give one")
    settings = Settings(
        tokens=tokens,
        context=context,
        batch=batch,
        seed=seed,
        layers=_layers(layers),
        count_prefix=count_prefix,
    )
    records, page = run(
        addresses,
        settings,
        model=model,
        text=text,
        dataset=dataset,
        device=device,
        dtype=dtype,
        other_model=other_model,
        reads=reads,
        writes=writes,
        out=out,
    )
    if json:
        rows = [record.json() | {"report": str(page)} for record in records]
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    print_summary(records)
    console().print(f"\nThe report: {page}")


def run(
    addresses: list[str],
    settings: "Settings",
    *,
    model: str | None = None,
    text: str | None = None,
    dataset: str | None = None,
    documents: list["Document"] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    other_model: bool = False,
    reads: str | None = None,
    writes: str | None = None,
    out: Path = Path("reports"),
    title: str = "Evaluation",
) -> tuple[list["Record"], Path]:
    """Evaluate `addresses` and write their report; the records and the page.

    `documents` stand for what `text` names, where the caller has read it already.
    """
    from gemscope import corpus, hub

    said = given(reads, writes, model)
    entries = [hub.obtain(hub.locate(address, said)) for address in each_address(addresses)]
    models = sorted({entry.model for entry in entries})
    if model is None and len(models) > 1:
        raise InputError(f"these dictionaries belong to several models: {', '.join(models)}; "
                         "evaluate one model's at a time")  # fmt: skip
    documents = documents or (
        corpus.read_dataset(dataset)
        if dataset is not None
        else corpus.read_text(corpus.BUNDLED if text is None else text)
    )
    saes = [hub.build(entry) for entry in entries]

    from gemscope import evaluate as ev
    from gemscope.lm import load_model

    lm = load_model(model or models[0], device=device, dtype=dtype)
    saes = [sae.to(lm.device) for sae in saes]
    for sae in saes:
        lm.check_widths(sae) if other_model else lm.check(sae)
    source = dataset or text or "the bundled held-out text"
    with ev.report_folder(out, "evaluation") as folder, token_progress() as progress:
        evaluations = ev.evaluate(lm, saes, documents, settings, progress)
        records = [
            ev.record(lm, sae, entry, evaluation, documents, settings, text=source)
            for sae, entry, evaluation in zip(saes, entries, evaluations, strict=True)
        ]
        page = ev.write_report(folder, records, title=f"{title}: {lm.name or model or models[0]}")
    return records, page


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(p.strip().isdecimal() and len(p) < 6 for p in parts):
        raise InputError(f"no layers {text!r}: give numbers such as 7,13")
    return tuple(sorted({int(p) for p in parts}))


def _layer_table(record: "Record") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for heading in ("written at", "L0 read there", "FVU", "delta loss alone"):
        table.add_column(heading, justify="left" if heading == "written at" else "right")
    for layer in record.layers:
        figures = [number(float(layer[n]), 3) for n in ("l0", "fvu", "delta_loss")]
        table.add_row(str(layer["site"]), *figures)
    return table


def print_summary(records: list["Record"]) -> None:
    """The figures that matter most, one dictionary a row."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("dictionary", overflow="fold")
    for heading in ("L0 (nominal)", "FVU (random)", "delta loss", "recovered", "silent"):
        table.add_column(heading, justify="right")
    for r in records:
        m = r.metrics
        table.add_row(
            r.address,
            f"{number(m['l0'], 3)} ({number(r.nominal_l0)})",
            f"{number(m['fvu'], 3)} ({number(r.baseline.get('fvu'), 3)})",
            number(m["delta_loss"], 3),
            percent(m["loss_recovered_mean"]),
            percent(m["dead_fraction"]),
        )
    to = console()
    to.print(table)
    for r in records:
        if r.layers:
            to.print(_layer_table(r))
    to.print(
        f"[dim]{records[0].tokens:,} tokens of {records[0].documents} document(s). FVU: variance not "
        "explained (random: a random dictionary of that L0).\nDelta loss: nats per token. "
        "Recovered: of the loss of mean ablation. Silent: features that never fired here.[/dim]"
    )
