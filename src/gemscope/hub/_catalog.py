"""What artefacts there are, and what is known of each without loading it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gemscope import formats, miniature
from gemscope.errors import InputError, did_you_mean
from gemscope.sites import FAMILIES, Site

RELEASE = "miniature"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artefact: its address, what it reads and writes, and where its weights are."""

    address: str
    kind: str
    """`sae` or `transcoder`."""
    reads: Site
    writes: Site
    d_in: int
    d_out: int
    d_sae: int
    l0: float
    """Nominal features per token: the target of training, not a measurement."""
    affine: bool
    dtype: str
    model: str
    licence: str | None
    path: Path

    def row(self) -> dict[str, str | int | float]:
        """What `gemscope list --json` says of it."""
        return {
            "address": self.address,
            "kind": self.kind,
            "reads": str(self.reads),
            "writes": str(self.writes),
            "d_in": self.d_in,
            "d_out": self.d_out,
            "d_sae": self.d_sae,
            "l0": self.l0,
        }


def catalog(query: str = "") -> list[Entry]:
    """The artefacts whose address or kind has every word of `query`, in the order of addresses."""
    words = query.lower().split()
    return [e for e in _bundled() if all(w in f"{e.address} {e.kind}".lower() for w in words)]


def locate(address: str) -> Entry:
    """The artefact of a catalog address, or of a local folder."""
    for entry in _bundled():
        if entry.address == address:
            return entry
    # Unlike those of pathlib, these do not fail on what cannot be a path.
    folder = Path(os.path.expanduser(address))
    if address and os.path.isdir(folder):
        return describe(folder, address=str(folder))
    raise InputError(
        f"no artefact at {address!r}: give one that `gemscope list` shows or a local folder; "
        + did_you_mean(address, [e.address for e in _bundled()])
    )


def describe(folder: Path, *, address: str, licence: str | None = None) -> Entry:
    """The facts of the artefact in `folder`, from its config and the header of its weights."""
    config, infos = formats.check(folder)
    family = FAMILIES[0]  # the layout names its sites in Gemma 3's words
    return Entry(
        address=address,
        kind=config.type,
        reads=family.site_of_hook(config.hf_hook_point_in),
        writes=family.site_of_hook(config.hf_hook_point_out),
        d_in=infos["w_enc"].shape[0],
        d_out=infos["w_dec"].shape[1],
        d_sae=infos["w_enc"].shape[1],
        l0=config.l0,
        affine=config.affine_connection,
        dtype={"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[infos["w_enc"].dtype],
        model=config.model_name,
        licence=licence,
        path=folder.resolve(),
    )


def published(entry: Entry) -> dict[str, Any] | None:
    """The figures its makers published for an artefact, named as `evaluate` names them.

    A local copy is known by the last two parts of its path, and only with the same model.
    """
    for known in json.loads((Path(__file__).parent / "published.json").read_text("utf-8")):
        suite = known["address"].split("/", 1)[1]
        if known["model"] == entry.model and entry.path.as_posix().endswith("/" + suite):
            return known
    return None


@cache
def _bundled() -> tuple[Entry, ...]:
    return tuple(sorted(_scan(miniature.SCOPE), key=lambda e: (e.reads, e.address)))


def _scan(root: Path) -> Iterator[Entry]:
    for config in root.glob(f"*/*/{formats.CONFIG}"):
        folder = config.parent
        address = f"{RELEASE}/{folder.relative_to(root).as_posix()}"
        yield describe(folder, address=address, licence=miniature.LICENCE)
