"""A graph in either format, told apart by the end of its file's name."""

from pathlib import Path

from gemscope.errors import InputError

from ._exchange import export_graph
from ._exchange_in import import_graph
from ._files import SUFFIX, load_graph, save_graph
from ._graph import Graph

GRAPH_FILES = (SUFFIX, ".json")
"""Ends of the names of files that hold graphs: gemscope's own, and circuit-tracer's."""


def check_graph_file(path: str | Path) -> None:
    """Refuse a file that no graph can be written to, before one is made."""
    file = Path(path).expanduser()
    if file.suffix not in GRAPH_FILES:
        raise InputError(f"{file} names no format: end it in {' or '.join(GRAPH_FILES)}")
    if file.is_dir():
        raise InputError(f"{file} is a folder; name the file to write")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file} cannot be written: there is no folder {file.absolute().parent}")


def save_graph_file(graph: Graph, path: str | Path) -> tuple[str, ...]:
    """Write a graph; what its file does not hold, or holds in another way."""
    check_graph_file(path)
    if Path(path).suffix == SUFFIX:
        save_graph(graph, path)
        return ()
    return export_graph(graph, path).notes


def load_graph_file(path: str | Path) -> Graph:
    """The graph in a file of gemscope's, or of circuit-tracer's or Neuronpedia's."""
    file = Path(path).expanduser()
    if file.suffix not in GRAPH_FILES:
        raise InputError(
            f"{file} is no file of a graph: those end in {SUFFIX} (gemscope trace --out), or in "
            ".json (circuit-tracer, Neuronpedia)"
        )
    return load_graph(file) if file.suffix == SUFFIX else import_graph(file)
