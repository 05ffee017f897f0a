"""What has been computed of a circuit, kept file by file: work that was interrupted goes on.

A part's name is a digest of all that it depends on: the model, the dictionaries, the example, the
settings, and what was asked. A part that is damaged is made anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from gemscope.activations import write_whole
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import SAE

_VERSION = 1
_DIGEST = "gemscope.digest"
_ROWS = 16
"""Decoder rows that stand for a dictionary in its digest."""


class Parts:
    """A folder of parts, or none: then everything is computed each time."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]):
        self.folder, self.about = folder, dict(about)

    def get(
        self, asked: Mapping[str, Any], names: Sequence[str],
        make: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors called `names` that `make` makes, or made before for the same question."""
        if self.folder is None:
            return make()
        whole = json.dumps([_VERSION, self.about, asked], sort_keys=True, default=str)
        file = self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:40]}.safetensors"
        found = _read(file)
        if found is not None and set(found) == set(names):
            return found
        made = {name: value.contiguous() for name, value in make().items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, save(made, {_DIGEST: _digest(made)}))
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
        return made


def _read(file: Path) -> dict[str, Tensor] | None:
    """What is in a part; None if it is not there or not whole."""
    try:
        if not file.is_file():
            return None
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get(_DIGEST)
        found = load(file.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        return None
    return found if said == _digest(found) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def digest_of(*tensors: Tensor) -> str:
    """A digest of numbers."""
    found = hashlib.sha256()
    for value in tensors:
        found.update(value.detach().cpu().double().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_model(model: LanguageModel) -> str:
    """Of its vectors, which another training would have changed: its norms and biases."""
    vectors = [p for p in model.hf.parameters() if p.ndim == 1]
    return digest_of(*vectors, model.hf.get_output_embeddings().weight[:_ROWS])


def digest_of_sae(sae: SAE) -> str:
    """Of biases, thresholds and some rows."""
    threshold = getattr(sae.activation, "threshold", None)
    vectors = [sae.b_enc, sae.b_dec, sae.w_dec[:_ROWS]]
    return digest_of(*vectors, *([threshold] if isinstance(threshold, torch.Tensor) else []))
