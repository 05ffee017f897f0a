"""`gemscope download`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import print_json

if TYPE_CHECKING:
    from gemscope.hub import Entry, Remote


def download(
    addresses: Annotated[list[str], typer.Argument(help="Catalog addresses, or owner/repository/folder of the hub.")],
    with_model: Annotated[bool, typer.Option("--with-model", help="The model they belong to as well.")] = False,
    token: Annotated[str | None, typer.Option(help="Of the hub; default: HF_TOKEN, or that of `hf auth login`.")] = None,
    to: Annotated[Path | None, typer.Option(help="A folder for the files; default: the hub's cache.")] = None,
    examples: Annotated[bool, typer.Option("--examples", help="The file of activating texts as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Download artefacts; run it again to go on."""
    from gemscope import hub

    if to is not None and to.exists() and not to.is_dir():
        raise InputError(f"{to} is a file, and --to is a folder for the files")
    # A mistyped address should be told before gigabytes of the one before it have come.
    found = [_look_up(address, token) for address in dict.fromkeys(addresses)]
    rows: list[dict[str, Any]] = []
    for address, entry, remote in found:
        if remote is not None:
            folder = hub.fetch(remote, token=token, to=to, examples=examples, quiet=json)
        else:
            assert entry is not None
            assert entry.path is not None
            folder = entry.path
        use = address if to is None or remote is None else str(folder)
        row = {"address": address, "path": str(folder), "bytes": _size(folder)}
        command = ["gemscope", "eval", use]
        if with_model:
            row |= (model := _model(entry or hub.locate(use), token, to, quiet=json))
            if to is not None and Path(model["model_path"]).is_relative_to(to):
                command += ["--model", model["model_path"]]
        rows.append(row | {"next": shlex.join(command)})
        if not json:
            _print(rows[-1], here=remote is None)
    if json:
        print_json(rows[0] if len(rows) == 1 else rows)


def _print(row: dict[str, Any], *, here: bool) -> None:
    already = "here already, " if here else ""
    print(f"{row['address']}: {already}{row['path']} ({_bytes(row['bytes'])})")
    if "model" in row:
        print(f"{row['model']}: {row['model_path']} ({_bytes(row['model_bytes'])})")
    print(f"Evaluate it: {row['next']}")


def _look_up(address: str, token: str | None) -> "tuple[str, Entry | None, Remote | None]":
    """An address with its entry, if the catalog or a folder has it, and its place on the hub."""
    from gemscope import hub

    known = {hub.BUNDLED_RELEASE, *(suite.name for suite in hub.releases())}
    first = {part.removesuffix("-canonical") for part in address.split("/")[:2]}
    if "/" in address and not first & known and not os.path.exists(os.path.expanduser(address)):
        # To describe what the catalog does not have, `locate` downloads it, without a word.
        return address, None, hub.find(address, token=token)
    entry = hub.locate(address)
    return address, entry, entry.remote


def _model(entry: "Entry", token: str | None, to: Path | None, *, quiet: bool) -> dict[str, Any]:
    from gemscope import hub

    folder = Path(hub.model_source(entry.model))
    if not folder.is_dir():
        folder = hub.fetch_model(entry.model, token=token, to=to, quiet=quiet)
    return {"model": entry.model, "model_path": str(folder), "model_bytes": _size(folder)}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 10**9 else f"{size / 1e6:,.1f} MB"
