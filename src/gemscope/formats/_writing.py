"""Folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def new_folder(folder: Path, read: Callable[[Path], Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if `read` can read what is in it then."""
    from safetensors import SafetensorError

    if folder.exists():
        raise InputError(f"{folder} exists; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as held:
            made = Path(held) / folder.name
            made.mkdir()
            yield made
            try:
                read(made)
            except InputError as error:
                # The folder it is about will be gone.
                raise InputError(str(error).replace(str(made), str(folder))) from None
            os.replace(made, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {error}") from None


def write_tensors(file: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    made: dict[str, Tensor] = {}
    for name, given in tensors.items():
        tensor = given.detach().cpu().contiguous()
        # The library refuses to write memory that two tensors share, tied biases say.
        shared = {t.untyped_storage().data_ptr() for t in made.values()}
        made[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor
    save_file(made, file)
    file.chmod(0o644)  # the library makes it its owner's alone
