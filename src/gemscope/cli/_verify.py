"""`gemscope verify`."""

from pathlib import Path
from typing import Annotated

import typer

from gemscope.errors import InputError

from ._show import bar, console, print_json


def verify_command(
    store: Annotated[Path, typer.Argument(help="Folder of the catalog store.")],
    addresses: Annotated[list[str] | None, typer.Argument(help="Dictionaries; default: all of the store.")] = None,
    contexts: Annotated[int, typer.Option(help="Contexts that are run again, of each dictionary.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list and nothing else.")] = False,
) -> None:  # fmt: skip
    """Recompute a sample of a store's numbers; exit code 1 if any disagrees."""
    from rich import progress as bars

    from gemscope import features, hub
    from gemscope.lm import load_model

    opened = features.Store.open(store)
    chosen = [
        opened.dictionary(a) for a in addresses or [d["address"] for d in opened.dictionaries()]
    ]
    if not chosen:
        raise InputError(f"{store} holds no dictionary yet; gemscope index adds one")
    found, models = [], {}
    with bar(bars.TextColumn("verifying"), bars.BarColumn(bar_width=30), bars.MofNCompleteColumn(),
             bars.TimeRemainingColumn()) as shown:  # fmt: skip
        task = shown.add_task("", total=len(chosen))
        for known in chosen:
            name = known["loaded_model"]
            if name not in models:
                models[name] = load_model(name, device=device, dtype=known["dtype"])
            entry = hub.obtain(hub.locate(known["address"]))
            sae = hub.build(entry).to(models[name].device)
            found.append(
                features.verify(
                    opened, models[name], sae, known["address"], digest=hub.digest(entry),
                    contexts=contexts, seed=seed,
                )
            )  # fmt: skip
            shown.advance(task)
    if json:
        print_json([v.json() for v in found])
    else:
        for v in found:
            state = "agree" if not v.disagree else f"{len(v.disagree)} disagree"
            console().print(
                f"{v.address}: {v.compared:,} figures, {state}, largest relative difference of "
                f"those that agree {v.worst:.1e}"
            )
            for line in v.disagree[:10]:
                console().print(f"  {line}")
    if any(v.disagree for v in found):
        raise typer.Exit(1)
