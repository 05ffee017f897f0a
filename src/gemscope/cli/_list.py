"""`gemscope list`."""

from typing import Annotated

import typer

from gemscope.errors import InputError, did_you_mean

from ._show import print_json


def list_command(
    query: Annotated[str, typer.Argument(help="Words that addresses must have.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the artefacts that can be loaded by address."""
    from gemscope.hub import catalog

    found = catalog(query)
    if json:
        print_json([entry.row() for entry in found])
        return
    if not found:
        known = [entry.address for entry in catalog()]
        raise InputError(f"no artefact matches {query!r}; {did_you_mean(query, known)}")
    width = max(len(entry.address) for entry in found)
    titles = f"{'kind':<10}  {'reads':<14}  {'writes':<14}  {'features':>8}  {'L0':>5}"
    print(f"{'address':<{width}}  {titles}")
    for e in found:
        print(
            f"{e.address:<{width}}  {e.kind:<10}  {e.reads!s:<14}  {e.writes!s:<14}  "
            f"{e.d_sae:>8,}  {e.l0:>5g}"
        )
