"""A store to begin with: some of the miniature's dictionaries, indexed and explained.

It is made in the user's cache by a process of its own, so that pages work meanwhile. Whoever makes
it holds a lock, which the system lets go when the process ends however it ends; what it is at is
in a small file, which any server reads. Interrupted, it goes on where it was.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gemscope import __version__

FIRST = (
    "miniature/resid_post/layer_3_width_2k_l0_medium",
    *(f"miniature/resid_post_all/layer_{layer}_width_384_l0_small" for layer in range(6)),
    "miniature/transcoder_all/layer_2_width_192_l0_small_affine",
)
"""Dictionaries of the miniature that a first look is at."""
_TOKENS = 60_000
_FINISHED, _LOADING = "finished", "loading the model"
_EVERY = 0.3
"""Seconds between two words on how far it is."""


def first_folder() -> Path:
    """Where the store is: in the user's cache, one of each version."""
    from platformdirs import user_cache_path

    return user_cache_path("gemscope") / f"miniature-{__version__}"


class Making:
    """The making of the store in `folder`, by this server or another one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, unless it is finished; if another process is at it, that one goes on."""
        self._process = subprocess.Popen(  # noqa: S603 (our own words)
            [sys.executable, "-m", __name__, str(self.folder)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            # Ctrl-C is for the server, which ends this by itself.
            start_new_session=True,
        )  # fmt: skip

    def told(self) -> dict[str, Any] | None:
        """What it is at, `{"what", "done", "of", "mistake"}`; None when the store is complete."""
        said = _read(self.folder)
        if said.get("what") == _FINISHED:
            return None
        mistake = None
        ended = self._process.poll() if self._process is not None else None
        if ended and said.get("mistake"):
            mistake = said["mistake"]
        elif ended is not None and not _at_work(self.folder):
            # Another one was at it; should that have been killed, it is this server's turn.
            self.start()
        what = said.get("what", _LOADING)
        return {"what": what.partition(" of ")[0], "done": said.get("done", 0),
                "of": said.get("of", 0), "mistake": mistake}  # fmt: skip

    def poll(self) -> int | None:
        """None while it goes on, as of a process."""
        told = self.told()
        return None if told is not None and told["mistake"] is None else 0

    def end(self) -> None:
        """Stop what this server began; what is done is kept."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def forget(folder: Path) -> None:
    """The store in `folder` is not there any more."""
    beside(folder, "making.json").unlink(missing_ok=True)


def make(folder: Path) -> int:
    """Make the store, or go on; 1 if that failed, and then the file says why."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(beside(folder, "lock"), timeout=0):
            if _read(folder).get("what") == _FINISHED and (folder / "store.json").is_file():
                return 0
            _say(folder, _LOADING)
            try:
                _make(folder)
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                _say(folder, "failed", mistake=first)
                return 1
            _say(folder, _FINISHED)
            return 0
    except Timeout:  # another one is at it
        return 0


def _make(folder: Path) -> None:
    if hasattr(os, "nice"):
        os.nice(10)  # readers first
    import torch

    from gemscope import explain, features, hub
    from gemscope.lm import load_model

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    store = features.Store.create(folder)
    last = 0.0

    def report(what: str, done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            _say(folder, what, done, of)

    subjects = []
    for address in FIRST:
        entry = hub.locate(address)
        subjects.append(
            features.Subject(
                address=address, sae=hub.build(entry), digest=hub.digest(entry),
                nominal_l0=entry.l0,
            )
        )  # fmt: skip
    features.index(
        load_model("miniature", device="cpu"), subjects, features.sources_of(tokens=_TOKENS),
        store, features.Settings(tokens=_TOKENS, keep_activations=True), model_name="miniature",
        progress=report,
    )  # fmt: skip
    explained = {e.dictionary for e in store.explanations()}
    for address in FIRST:
        if address not in explained:
            works = explain.choose(store, [address], None)
            explain.run_rules(store, works, explain.ModelSettings(scores=()), progress=report)


def beside(folder: Path, what: str) -> Path:
    """A file about the store in `folder`, next to it."""
    return folder.with_name(f"{folder.name}.{what}")


def _at_work(folder: Path) -> bool:
    """Whether some process holds the lock."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(beside(folder, "lock"), timeout=0):
            return False
    except Timeout:
        return True


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(beside(folder, "making.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(folder: Path, what: str, done: int = 0, of: int = 0, mistake: str | None = None) -> None:
    file = beside(folder, "making.json")
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"what": what, "done": done, "of": of, "mistake": mistake}), "utf-8")
    part.replace(file)


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[1])))
