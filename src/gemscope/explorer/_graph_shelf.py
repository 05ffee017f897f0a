"""The graphs that are kept: in the folder `graphs` of each open store, and files given by name."""

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError, did_you_mean

from ._microscope_reading import said_of
from ._workbench import Workbench

if TYPE_CHECKING:
    from gemscope.circuits import Graph

SUFFIX = ".safetensors"
_KEPT = 4
"""Graphs that stay loaded."""
_LISTED = 500
"""Graphs of a list."""

Summary = dict[str, Any]


class Shelf:
    """Finds graphs by name, loads and keeps them.

    A name is looked up among those that are there: it never becomes part of a path.
    """

    def __init__(self, bench: Workbench):
        self._bench = bench
        self._loaded: OrderedDict[tuple[Path, int, int], Graph] = OrderedDict()
        self._summaries: dict[tuple[Path, int, int], Summary] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def files(self) -> dict[str, Path]:
        """File of each graph by its name: kept ones before given ones, of stores the first's."""
        found: dict[str, Path] = {}
        for store in self._bench.stores:
            for file in sorted((Path(store.folder) / "graphs").glob(f"*{SUFFIX}")):
                if file.is_file():
                    found.setdefault(file.stem, file)
        for file in self._bench.graphs:
            found.setdefault(file.stem, file)
        return found

    def file(self, name: str) -> Path:
        """The file of a graph."""
        found = self.files()
        if name not in found:
            near = did_you_mean(name, found) if found else "trace one first"
            raise InputError(f"no graph is called {name[:100]!r}; {near}")
        return found[name]

    def graph(self, name: str) -> "Graph":
        """A graph, as its file is at the moment."""
        return self._load(self.file(name))

    def _load(self, file: Path) -> "Graph":
        key = _state(file)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key]
        found = read(file)
        with self._lock:
            self._loaded[key] = found
            while len(self._loaded) > _KEPT:
                self._loaded.popitem(last=False)
        return found

    def list(self) -> list[Summary]:
        """What each graph is, the newest first; of one that cannot be read, why."""
        files = sorted(self.files().items(), key=lambda pair: -_state(pair[1])[1])
        return [self._summary(name, file) for name, file in files[:_LISTED]]

    def _summary(self, name: str, file: Path) -> Summary:
        key = _state(file)
        if key not in self._summaries:
            try:
                self._summaries[key] = _about(read(file))
            except InputError as error:
                self._summaries[key] = {"mistake": str(error)}
        kept = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key[1] / 1e9))
        return {"name": name, "kept": kept, **self._summaries[key]}

    def change(self, name: str, how: Callable[["Graph"], "Graph"]) -> "Graph":
        """Change a graph in its file; one that was given as JSON is kept in the first store."""
        from gemscope.circuits import save_graph

        with self._writing:
            file = self.file(name)
            new = how(self._load(file))
            save_graph(new, file if file.suffix == SUFFIX else self._folder() / f"{name}{SUFFIX}")
        return new

    def add(self, graph: "Graph") -> str:
        """Keep a graph that was traced; its name is made from what it is of."""
        from gemscope.circuits import save_graph

        words = re.sub(r"[^a-z0-9]+", "-", graph.prompt.lower())[-40:].strip("-") or "graph"
        what = repr((graph.prompt, graph.dictionaries, [t.text for t in graph.targets],
                     sorted(graph.settings.items(), key=str)))  # fmt: skip
        stem = f"{words}-{hashlib.sha256(what.encode('utf-8', 'replace')).hexdigest()[:6]}"
        with self._writing:
            taken, name, number = self.files(), stem, 2
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            save_graph(graph, self._folder() / f"{name}{SUFFIX}")
        return name

    def _folder(self) -> Path:
        """Where graphs are kept: in the first store."""
        if not self._bench.stores:
            raise InputError("no store is open to keep a graph in; give one to gemscope serve")
        folder = Path(self._bench.stores[0].folder) / "graphs"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror or error}") from None
        return folder


def read(file: Path) -> "Graph":
    """The graph in a file of either kind."""
    from gemscope.circuits import import_graph, load_graph

    return load_graph(file) if file.suffix == SUFFIX else import_graph(file)


def _state(file: Path) -> tuple[Path, int, int]:
    try:
        now = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    return file, now.st_mtime_ns, now.st_size


def _about(graph: "Graph") -> Summary:
    """What a list says of a graph."""
    return {
        "prompt": graph.prompt, "model": graph.model, "tokens": len(graph.tokens),
        "nodes": len(graph.nodes), "edges": len(graph.edges),
        "targets": [t.label for t in graph.targets],
        "dictionaries": sorted(set(graph.dictionaries)), "groups": len(graph.groups),
        "scores": {"replacement": graph.scores.replacement,
                   "completeness": graph.scores.completeness},
        "checked": graph.checked is not None, "stability": graph.stability is not None,
    }  # fmt: skip


def record(bench: Workbench, graph: "Graph", name: str, *, columns: bool = False) -> dict[str, Any]:
    """A graph as JSON, with what the open stores call its features.

    With `columns` edges are three lists, of places in `nodes` and of weights, which is what the
    page draws from; otherwise each is an object with the ids of its ends.
    """
    out = graph.json()
    known = bench.known()
    unnamed = {}
    for place, node in enumerate(graph.nodes):
        address = graph.address(node)
        if address and node.id not in graph.labels and address not in graph.labels:
            dictionary, _, index = address.rpartition("/")
            if dictionary in known:
                unnamed[place] = (dictionary, int(index))
    said = said_of(bench, unnamed.values()) if unnamed else {}
    for place, one in unnamed.items():
        if one in said:
            out["nodes"][place]["label"] = said[one][0]
    if columns:
        out["edges"] = {
            "source": graph.edges.source.tolist(), "target": graph.edges.target.tolist(),
            "weight": [edge["weight"] for edge in out["edges"]],
        }  # fmt: skip
    return {
        "name": name, **out, "renamed": sorted(set(graph.labels) & set(graph.places)),
        "indexed": sorted(set(graph.dictionaries) & set(known)),
    }  # fmt: skip
