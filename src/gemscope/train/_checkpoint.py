"""Everything a run needs to go on, in one safetensors file: no pickle, whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gemscope.errors import InputError


def save_checkpoint(file: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace `file` by these tensors and this JSON-able state, atomically."""
    part = file.with_suffix(".part")
    payload = save(
        {n: t.detach().contiguous() for n, t in tensors.items()}, {"state": json.dumps(state)}
    )
    try:
        with part.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"the checkpoint cannot be written to {file}: {error.strerror}; the one before it, if "
            "any, is untouched: make room and run the command again"
        ) from None


def load_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote."""
    try:
        with safe_open(file, framework="pt") as stored:
            state = json.loads(stored.metadata()["state"])
            # Cloned: the file will be replaced while the tensors live.
            return {name: stored.get_tensor(name).clone() for name in list(stored.keys())}, state
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise InputError(
            f"{file} is not a checkpoint, or damaged; remove it to begin anew"
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The moments of an optimizer over parameters called `names`, in their order."""
    out = {}
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            out[f"optimizer.{names[index]}.{key}"] = value
    return out


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, parameter, key = name.split(".")
            state.setdefault(names.index(parameter), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
