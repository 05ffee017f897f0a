"""`gemscope export-site`."""

from pathlib import Path
from typing import Annotated

import typer

from gemscope.errors import InputError

from ._show import console, print_json, token_progress


def export_site_command(
    store: Annotated[Path, typer.Argument(help="Folder of the catalog store.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[ADDRESS/INDEX]...", help="Features, beside those after --features.")] = None,
    features: Annotated[list[str] | None, typer.Option(metavar="ADDRESS/INDEX", help="Features to write pages of; more may follow.")] = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Every feature that has a note or an explanation.")] = False,
    top: Annotated[tuple[int, str] | None, typer.Option(metavar="N ADDRESS", help="The N features of a dictionary whose explanations have the best scores.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the site.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a site that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:  # fmt: skip
    """Write pages of chosen features as plain files that open without a server."""
    if to is None:
        raise InputError("where to? name the folder of the site with --to FOLDER")
    from gemscope import explorer, hub
    from gemscope.features import Store

    opened = Store.open(store)
    chosen = [hub.feature_of(name) for name in [*(features or []), *(more or [])]]
    if labelled:
        chosen += explorer.labelled(opened)
    if top is not None:
        chosen += explorer.best_of(opened, top[1], top[0])
    with token_progress(unit="pages") as told:
        made = explorer.export_site(opened, chosen, to, force=force, told=told)
    if json:
        print_json({"folder": str(made.folder), "index": str(made.index), "pages": made.pages})
        return
    console().print(f"{made.pages:,} pages: {made.index}")
