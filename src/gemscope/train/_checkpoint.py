"""Everything a run needs to go on, in a folder that is there whole or not at all: no pickle."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemscope.errors import InputError

_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of a run: a folder each under `checkpoint`, one tensor file an artefact."""

    def __init__(self, run: Path):
        self.folder = run / "checkpoint"

    def exists(self) -> bool:
        """Whether there is one to go on from."""
        return self._latest() is not None

    def save(
        self, step: int, tensors: Sequence[Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Write that of `step`; then those before it go."""
        whole = self.folder / f"step-{step:08d}"
        part = whole.with_suffix(".part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for place, of_one in enumerate(tensors):
                file = part / f"{place}.safetensors"
                save_file({n: t.detach().contiguous() for n, t in of_one.items()}, file)
                _flush(file)
            (part / "state.json").write_text(json.dumps(state), "utf-8")
            _flush(part / "state.json")
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(part, whole)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"the checkpoint cannot be written to {self.folder}: {why}; the one before it, if "
                "any, is untouched: make room and run the command again"
            ) from None
        for other in self._all():
            if other != whole:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """State and tensors of the last one."""
        latest = self._latest()
        if latest is None:
            raise InputError(f"there is no checkpoint in {self.folder}")
        try:
            state = json.loads((latest / "state.json").read_text("utf-8"))
            tensors = []
            for place in range(len(state["artefacts"])):
                with safe_open(latest / f"{place}.safetensors", framework="pt") as stored:
                    # Cloned: the file will go while the tensors live.
                    tensors.append({n: stored.get_tensor(n).clone() for n in list(stored.keys())})
            return state, tensors
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            raise InputError(
                f"{latest} is not a checkpoint, or damaged; remove {self.folder} to begin anew"
            ) from None

    def remove(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(f for f in self.folder.iterdir() if _NAME.fullmatch(f.name))

    def _latest(self) -> Path | None:
        found = self._all()
        return found[-1] if found else None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
