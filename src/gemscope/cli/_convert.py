"""`gemscope convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ._show import console
from ._sites import Reads, Writes, given


def convert(
    address: Annotated[str, typer.Argument(help="A catalog address, a local folder, or owner/repo/path.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    layout: Annotated[str, typer.Option(help="gemma-scope, gemma-scope-2 or saelens.")] = "gemma-scope-2",
    reads: Reads = None,
    writes: Writes = None,
    model: Annotated[str | None, typer.Option(help="Its model, if its files do not say.")] = None,
) -> None:  # fmt: skip
    """Write an artefact in another file layout, numbers unchanged."""
    from gemscope import hub

    entry = hub.obtain(hub.locate(address, given(reads, writes, model)))
    made = hub.save_sae(hub.build(entry), folder, layout=layout)
    console().print(f"Written: {made}\nLoad it: gemscope info {made}")
