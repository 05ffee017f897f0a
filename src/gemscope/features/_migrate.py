"""Moving a catalog store forward to this gemscope's layout, one numbered step at a time.

A step changes tables so that whoever reads them already is not disturbed: LanceDB keeps the
versions that are in use. `store.json` is written after each step, so a step that was interrupted
is done again; every step therefore first looks at what is there.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import WeakFileLock

from gemscope.activations import write_whole
from gemscope.errors import InputError

from ._activations import read_json
from ._tables import VERSION

if TYPE_CHECKING:
    from ._store import Store


def _add_output_scores(store: "Store") -> None:
    """1 to 2: the column `output_score` of features, null until somebody measures it."""
    table = store.table("features")
    if "output_score" not in table.schema.names:
        table.add_columns({"output_score": "cast(NULL as double)"})


STEPS: dict[int, Callable[["Store"], None]] = {1: _add_output_scores}
"""What moves a store on, by the version it starts from."""


def check_version(folder: Path, known: dict[str, Any]) -> int:
    """The version of the store in `folder`; refuses what is no store, or one of a newer layout."""
    version = known.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(
            f"{folder} is no catalog store that this gemscope knows: see its store.json"
        )
    if version > VERSION:
        raise InputError(
            f"{folder} has version {version} of the layout and this gemscope reads up to "
            f"{VERSION}; update gemscope"
        )
    return version


def move_forward(store: "Store") -> None:
    """Bring a store to the layout of today, if another process has not done so meanwhile."""
    folder = store.folder
    try:
        with WeakFileLock(folder / "store.json.lock"):
            version = check_version(folder, read_json(folder / "store.json") or {})
            for step in range(version, VERSION):
                STEPS[step](store)
                said = json.dumps({"version": step + 1}).encode()
                write_whole(folder / "store.json", said)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} is of an older layout, which is brought up to date when it is opened, and "
            f"it cannot be written ({first[:200]}); copy it to where it can be, and open that"
        ) from None
