"""`gemscope info`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._show import print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.hub import Entry


def info(
    address: Annotated[str, typer.Argument(help="A catalog address, a local folder, or owner/repo/path.")],
    reads: Reads = None,
    writes: Writes = None,
    model: Annotated[str | None, typer.Option(help="Its model, if its files do not say.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:  # fmt: skip
    """Show what is known of an artefact."""
    from gemscope import hub

    facts = _facts(hub.locate(address, given(reads, writes, model), download=False))
    if json:
        print_json(facts)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if name in ("bytes", "d_sae") and value is not None:
            value = f"{value:,}"
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"{name:<{width}}  {'unknown' if value is None else value}")


def _facts(entry: "Entry") -> dict[str, Any]:
    from gemscope import formats, hub

    facts = None if entry.path is None else formats.inspect(entry.path)
    if facts is None:
        shapes, size = hub.expected_shapes(entry), hub.expected_bytes(entry)
    else:
        shapes, size = facts.shapes, sum(f.stat().st_size for f in facts.files)
    return entry.row() | {
        "licence": entry.licence,
        "layout": entry.layout,
        "dtype": entry.dtype,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": _files(entry) if facts is None else len(facts.files),
        "bytes": size,
        "here": entry.path is not None,
        "path": None if entry.path is None else str(entry.path),
        "page": None if entry.remote is None else entry.remote.page,
        "neuronpedia": entry.neuronpedia,
        "model_path": hub.model_source(entry.model),
        "published": hub.published(entry),
    }


def _files(entry: "Entry") -> int:
    return len(entry.remote.files) if entry.remote else 0
