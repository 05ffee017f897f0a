"""`gemscope info`."""

from typing import Annotated, Any

import typer

from ._show import print_json


def info(
    address: Annotated[str, typer.Argument(help="A catalog address or a local folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is known of an artefact, without loading its weights."""
    facts = _facts(address)
    if json:
        print_json(facts)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"{name:<{width}}  {'unknown' if value is None else value}")


def _facts(address: str) -> dict[str, Any]:
    from gemscope import formats, hub

    entry = hub.locate(address)
    file = entry.path / formats.PARAMETERS
    shapes = formats.read_shapes(entry.path)
    return entry.row() | {
        "affine": entry.affine,
        "model": entry.model,
        "licence": entry.licence,
        "dtype": entry.dtype,
        "shapes": {name: list(info.shape) for name, info in shapes.items()},
        "bytes": file.stat().st_size,
        "path": str(entry.path),
        "model_path": hub.model_source(entry.model),
        "published": hub.published(entry),
    }
