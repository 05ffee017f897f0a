"""One artefact of the catalog, of the hub or of a folder: what is known of it, and where it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.sites import Site, Sites


@dataclass(frozen=True, slots=True)
class Remote:
    """Where an artefact's files are on the hub."""

    repo: str
    """`owner/name`."""
    folder: str
    """Of the artefact in the repository; empty for the repository itself."""
    files: tuple[str, ...]
    """Names below `folder` that loading needs."""
    optional: tuple[str, ...] = ()
    """Names that loading uses if they exist: some published folders lack their config."""

    @property
    def page(self) -> str:
        """The repository's page, where a licence is accepted."""
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artefact: its address, what it reads and writes, and where its weights are."""

    address: str
    kind: str
    """`sae`, `transcoder`, `crosscoder` or `clt`."""
    reads: Site | Sites
    writes: Site | Sites
    d_in: int
    d_out: int
    d_sae: int
    """Features, of all layers together."""
    l0: float | None
    """Nominal features per token. Gemma Scope's is a measurement on its makers' text, Gemma Scope
    2's the target of training."""
    affine: bool
    dtype: str
    model: str
    licence: str | None
    layout: str
    """Name of the file layout, as `formats` knows it."""
    canonical: bool = False
    """Whether it is its layer's and width's nearest to an L0 of 100: Gemma Scope's choice."""
    neuronpedia: str | None = None
    """Name of its dashboards."""
    path: Path | None = None
    """Its folder, if that is here; otherwise `remote` says where it is."""
    remote: Remote | None = None

    @property
    def release(self) -> str:
        """First part of a catalog address."""
        return self.address.split("/", 1)[0]

    def row(self) -> dict[str, Any]:
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
            "affine": self.affine,
            "model": self.model,
            "canonical": self.canonical,
        }
