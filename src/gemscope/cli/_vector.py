"""`gemscope vector`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._show import console, print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.hub import Given
    from gemscope.steering import Change, Strength


def vector_command(
    feature: Annotated[str, typer.Argument(metavar="ADDRESS/INDEX", help="The feature.")],
    strength: Annotated[list[str], typer.Option(help="What to add of it: 4, or 0.5xmax for half of its measured maximum. Once for all features, or once for each.")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="The file to write: .safetensors, or .gguf for a control vector of llama.cpp and repeng.")],
    more: Annotated[list[str] | None, typer.Option("--feature", metavar="ADDRESS/INDEX", help="Another feature, added as well. May be repeated.")] = None,
    store: Annotated[Path | None, typer.Option(help="A store of gemscope index: maxima come from it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file if it exists.")] = False,
    reads: Reads = None,
    writes: Writes = None,
    model: Annotated[str | None, typer.Option(help="Their model, if their files do not say.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Write features as a steering vector that other programs can add."""
    from gemscope import steering

    steering.check_target(to.expanduser(), force=force)
    names = [feature, *(more or ())]
    strengths = [steering.Strength.parse(text) for text in strength]
    if len(strengths) not in (1, len(names)):
        raise InputError(
            f"{len(strengths)} strengths for {len(names)} features: give one for all, or one each"
        )
    known = given(reads, writes, model)
    changes = _changes(names, strengths * (len(names) // len(strengths)), store, to, known)
    made = steering.save_vector(changes, to, force=force)
    found = steering.vectors_of(changes)
    sites = [
        {"site": str(site), "width": len(vector), "norm": float(vector.norm())}
        for site, vector in found.sites.items()
    ]
    if json:
        print_json({"file": str(made), "model": found.model, "vectors": sites})
        return
    for row in sites:
        console().print(f"{row['site']}: {row['width']} numbers, norm {row['norm']:.4g}")
    if to.suffix == ".gguf":
        layers = ", ".join(str(steering.control_layer(site)) for site in found.sites)
        console().print(f"Control vector of layer {layers}; readers add it at BOS too.")
    console().print(f"Written: {made}")


def _changes(
    names: list[str], strengths: "list[Strength]", store: Path | None, to: Path, known: "Given"
) -> "list[Change]":
    from gemscope.features import Store
    from gemscope.sae import Dictionary
    from gemscope.steering import Change, Mode, Positions, load_feature

    opened = None if store is None else Store.open(store)
    # Those who read control vectors know of no special tokens.
    where = Positions(special=to.suffix == ".gguf")
    loaded: dict[str, Dictionary] = {}
    features = [load_feature(name, store=opened, given=known, known=loaded) for name in names]
    return [
        Change(what=what, mode=Mode.ADD, strength=strength, positions=where)
        for what, strength in zip(features, strengths, strict=True)
    ]
