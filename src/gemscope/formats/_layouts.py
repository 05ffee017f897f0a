"""The layouts that can be read, and which of them a folder is in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from gemscope.errors import InputError

from . import (
    _dictionary_learning,
    _gemma_scope,
    _gemma_scope_2,
    _llama_scope,
    _r1_distill,
    _saelens,
    _sparsify,
)
from ._facts import Facts, Part


@runtime_checkable
class _Reader(Protocol):
    NAME: str

    def matches(self, folder: Path) -> bool: ...
    def inspect(self, folder: Path) -> Facts: ...
    def read(self, folder: Path) -> tuple[Part, ...]: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """A published layout: its reader, and how it is told by its files."""

    reader: _Reader
    files: str

    @property
    def name(self) -> str:
        """Its name, such as `gemma-scope-2`."""
        return self.reader.NAME


LAYOUTS = (
    Layout(cast(_Reader, _gemma_scope), "params.npz"),
    Layout(cast(_Reader, _gemma_scope_2), "params.safetensors or params_layer_*.safetensors"),
    Layout(cast(_Reader, _llama_scope), "hyperparams.json and checkpoints/final.safetensors"),
    Layout(cast(_Reader, _r1_distill), "config.json and sae_weights.safetensors"),
    Layout(cast(_Reader, _saelens), "cfg.json and sae_weights.safetensors"),
    Layout(cast(_Reader, _sparsify), "cfg.json and sae.safetensors"),
    Layout(cast(_Reader, _dictionary_learning), "config.json and ae.pt"),
)


def layout_of(folder: Path) -> Layout:
    """The layout of `folder`, from the names of its files."""
    found = [layout for layout in LAYOUTS if layout.reader.matches(folder)]
    match found:
        case [layout]:
            return layout
        case []:
            known = "; ".join(f"{x.files} ({x.name})" for x in LAYOUTS)
            raise InputError(f"no weights in {folder}: an artefact's folder holds {known}")
        case _:
            raise InputError(
                f"{folder} holds several artefacts: {', '.join(x.files for x in found)}; "
                "keep one of them in it"
            )


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, in whatever layout it is."""
    return layout_of(folder).reader.inspect(folder)


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors of the artefact in `folder`: one part, or one for each layer."""
    return layout_of(folder).reader.read(folder)
