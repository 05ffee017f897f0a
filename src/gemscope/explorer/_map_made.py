"""Making maps: `gemscope cluster` in a process of its own, once for a run; kept beside the store.

A tree and a map of many features take seconds to minutes and one of them holds the interpreter, so
they are made outside it, one at a time. What was made is a file `maps/RUN-ON.json` of the store,
where it can be written, and a few stay in memory.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gemscope.activations import write_whole
from gemscope.errors import InputError
from gemscope.features import Store, described

from ._map_tree import Tree, tree_of
from ._workbench import Workbench
from ._worker import Busy

On = Literal["together", "directions"]
KINDS: tuple[On, ...] = ("together", "directions")
Record = dict[str, Any]

_KEPT = 8
"""Maps that stay in memory."""
_SECONDS = 1_800.0
"""Of making one map."""
_COMMAND = "import sys; from gemscope.cli import main; sys.exit(main(sys.argv[1:]))"


class Made:
    """A map: what `gemscope cluster --json --map` printed, and its tree in groups."""

    def __init__(self, record: Record):
        self.record = record

    @cached_property
    def tree(self) -> Tree:
        """The tree as it is shown."""
        return tree_of(self.record)


@dataclass(frozen=True, slots=True)
class State:
    """How far a map is."""

    name: Literal["ready", "making", "waiting"]
    seconds: float
    """Since it was asked for."""
    made: Made | None = None


class Maps:
    """Maps by address and kind, made when they are first asked for."""

    def __init__(self, bench: Workbench):
        self._bench = bench
        self._ready: OrderedDict[tuple[str, str], Made] = OrderedDict()
        self._begun: dict[tuple[str, str], tuple[float, Future[Record]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="map")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @asynccontextmanager
    async def lifespan(self, _app: Any) -> AsyncIterator[None]:
        """What is being made ends with the server."""
        yield
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def state(self, address: str, on: On) -> State:
        """The map, or how far it is; begun if nobody asked for it before."""
        store = self._bench.store_of(address)
        known = store.dictionary(address)
        if store.activations(address) is None:
            raise InputError(
                f"the activations of {address} were not kept, and its map is counted on them; "
                f"gemscope index {address} --to {store.folder} --keep-activations keeps them"
            )
        key = (known["run"], on)
        with self._lock:
            if key in self._ready:
                self._ready.move_to_end(key)
                return State("ready", 0.0, self._ready[key])
            begun = self._begun.get(key)
        if begun is None:
            file = file_of(store, key[0], on)
            if (record := read(file, address)) is not None:
                return State("ready", 0.0, self._keep(key, record))
            begun = self._begin(key, store, address, on, file)
        since, future = begun
        if not future.done():
            name: Literal["making", "waiting"] = "making" if future.running() else "waiting"
            return State(name, time.monotonic() - since)
        with self._lock:
            self._begun.pop(key, None)
        return State("ready", 0.0, self._keep(key, future.result()))

    def said(self, address: str, features: Iterable[int]) -> dict[int, str]:
        """What some features of a dictionary are called, as it is now."""
        store = self._bench.store_of(address)
        found = described(store, [(address, feature) for feature in features])
        return {feature: text for (_, feature), (text, _) in found.items()}

    def figures(self, address: str) -> list[list[float]]:
        """Density and maximum of each feature of a dictionary."""
        return self._bench.store_of(address).figures()[address].tolist()

    def _keep(self, key: tuple[str, str], record: Record) -> Made:
        made = Made(record)
        with self._lock:
            self._ready[key] = made
            while len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
        return made

    def _begin(
        self, key: tuple[str, str], store: Store, address: str, on: On, file: Path
    ) -> tuple[float, "Future[Record]"]:
        with self._lock:
            if key not in self._begun:
                if len(self._begun) >= self._bench.limits.waiting:
                    raise Busy
                future = self._pool.submit(self._make, store, address, on, file)
                self._begun[key] = (time.monotonic(), future)
            return self._begun[key]

    def _make(self, store: Store, address: str, on: On, file: Path) -> Record:
        if self._closed:
            raise InputError("the server is closing")
        options = ["--on", on, "--json", "--map", "--", str(store.folder.absolute()), address]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(  # noqa: S603 (our own words, no shell)
                [sys.executable, "-c", _COMMAND, "cluster", *options], stdout=out, stderr=said
            )
            try:
                code = self._process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise InputError(
                    f"the map of {address} took longer than {_SECONDS / 60:.0f} minutes"
                ) from None
            said.seek(0)
            told = said.read().decode("utf-8", "replace").strip()
            if code:
                last = told.splitlines()[-1] if told else f"it ended with {code}"
                raise InputError(f"{address}: {last.removeprefix('gemscope: ')}")
            out.seek(0)
            record: Record = json.load(out)
        _write(file, record, {d["run"] for d in store.dictionaries()})
        return record


def file_of(store: Store, run: str, on: On) -> Path:
    """Where the map of a run is kept."""
    return store.folder / "maps" / f"{run}-{on}.json"


def read(file: Path, address: str) -> Record | None:
    """What was kept; nothing where it is not whole or of something else."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    fits = isinstance(found, dict) and found.get("dictionary") == address and "map" in found
    return found if fits else None


def _write(file: Path, record: Record, runs: set[str]) -> None:
    """Keep it beside the store, and remove those of runs no longer in force."""
    try:
        file.parent.mkdir(exist_ok=True)
        write_whole(file, json.dumps(record).encode())
        for old in file.parent.glob("*-*.json"):
            if old.name.rpartition("-")[0] not in runs:
                old.unlink(missing_ok=True)
    except OSError:
        # A store that only may be read: then it is made again after a restart.
        return
