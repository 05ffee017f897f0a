"""Attribution graphs: the list of those kept, tracing, and the page of one."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from gemscope import hub
from gemscope.errors import InputError
from gemscope.features import Note, marked

from . import _feature_draw as draw
from ._feature import Features, _json
from ._feature_record import write_note
from ._graph_change import (
    ChangeIn,
    IdsIn,
    NameIn,
    ViewIn,
    compared,
    intervened,
    renamed,
    viewed,
)
from ._graph_shelf import SUFFIX, Shelf, record
from ._graph_trace import TraceIn, set_of, sets, traced
from ._render import page
from ._stream import json_lines
from ._workbench import Workbench
from ._worker import Worker

_MISTAKES: dict[int | str, dict[str, Any]] = {
    422: {"description": "No such graph or node, or a parameter out of bounds."},
    503: {"description": "Too much model work waits."},
}
_STREAM: dict[int | str, dict[str, Any]] = _MISTAKES | {
    200: {
        "description": 'Lines `{"what": ..., "done": ..., "of": ...}` on the way, then '
        '`{"done": {"name": ...}}`, or `{"error": ...}`.',
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    }
}
_CONTEXTS = 5
"""Contexts of a feature that the card beside a graph shows."""
Name = Annotated[str, Query(max_length=300, description="Name of a graph.")]
_LAYOUTS = {"own": SUFFIX, "circuit-tracer": ".json"}


class Graphs:
    """What the routes share."""

    def __init__(self, bench: Workbench, worker: Worker):
        self.bench, self.worker, self.shelf = bench, worker, Shelf(bench)
        self.features = Features(bench, worker)


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/graphs`, `/graph/{name}` and their twins under `/api`."""
    made, of = APIRouter(), Graphs(bench, worker)
    _add_list(made, of)
    _add_graph(made, of)
    _add_changes(made, of)
    return made


def _add_list(made: APIRouter, of: Graphs) -> None:
    @made.get("/graphs", include_in_schema=False)
    def graphs_page(
        request: Request,
        prompt: Annotated[str, Query(max_length=20_000)] = "",
        with_: Annotated[str, Query(alias="with", max_length=500)] = "",
        target: Annotated[list[str], Query(max_length=10)] = [],  # noqa: B006
    ) -> Response:
        known = sets(of.bench)
        return page(
            request, "graphs.html", graphs=of.shelf.list(), sets=known, prompt=prompt,
            targets=target, chosen=with_ or set_of(known, target), limits=of.bench.limits,
        )  # fmt: skip

    @made.get("/api/graphs", responses=_MISTAKES, tags=["graph"])
    def graphs_json() -> dict[str, Any]:
        """The graphs that are kept, the newest first, and the transcoder sets to trace with."""
        return {"graphs": of.shelf.list(), "sets": sets(of.bench)}

    @made.post("/api/graphs", responses=_STREAM, tags=["graph"], response_class=StreamingResponse)
    async def trace_graph(given: TraceIn) -> Response:
        """Trace a prompt and keep the graph in the first store. Whoever leaves ends it."""
        pieces = of.worker.stream(lambda stop, put: traced(of.bench, of.shelf, given, stop, put))
        # What is refused is refused with the first piece, before an answer has begun.
        first = await anext(pieces)
        said = "trace it with gemscope trace, or a shorter text"
        lines = json_lines(first, pieces, too_long=said)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @made.get("/api/graphs/compare", responses=_MISTAKES, tags=["graph"])
    def compare_graphs(first: Name, second: Name) -> Response:
        """Features of two graphs: shared, only in the first, only in the second."""
        return _json(compared(of.shelf.graph(first), of.shelf.graph(second)))


def _add_graph(made: APIRouter, of: Graphs) -> None:
    @made.get("/graph/{name}", include_in_schema=False)
    def graph_page(
        request: Request, name: str,
        with_: Annotated[str, Query(alias="with", max_length=300)] = "",
    ) -> Response:  # fmt: skip
        graph = of.shelf.graph(name)
        other = of.shelf.graph(with_) if with_ else None
        return page(
            request, "graph.html", name=name, graph=graph, url=f"/graph/{quote(name, safe='')}",
            api=f"/api/graph/{quote(name, safe='')}", other=other, other_name=with_,
            other_api=f"/api/graph/{quote(with_, safe='')}", marked=marked,
            found=compared(graph, other) if other else None,
            others=[one for one in of.shelf.list() if one["name"] != name and "prompt" in one],
        )  # fmt: skip

    @made.get("/graph/{name}/node", include_in_schema=False)
    async def node_part(
        request: Request, name: str, id: Annotated[str, Query(max_length=100)]
    ) -> Response:
        graph = await run_in_threadpool(of.shelf.graph, name)
        address = graph.address(graph.nodes[graph.place(id)])
        if address is None:
            raise InputError(f"{id} is no feature and has no card")
        values = await run_in_threadpool(_card, of, address)
        if values["r"] is None:
            values["promoted"] = await of.worker.run(
                lambda _stop: _promoted(of.bench, address, graph.model)
            )
        return await run_in_threadpool(
            lambda: page(request, "graph_node.html", draw=draw, name=address, **values)
        )

    @made.get("/api/graph/{name}", responses=_MISTAKES, tags=["graph"])
    def graph_json(name: str, edges: Literal["objects", "columns"] = "objects") -> Response:
        """The whole graph: nodes, edges, targets, scores, groups, pins, checks."""
        return _json(record(of.bench, of.shelf.graph(name), name, columns=edges == "columns"))

    @made.get("/graph/{name}/file", include_in_schema=False)
    def graph_file(
        name: str, layout: Annotated[str, Query(pattern="^(own|circuit-tracer)$")] = "own"
    ) -> Response:
        return _file(of.shelf, name, layout)


def _file(shelf: Shelf, name: str, layout: str) -> Response:
    """A graph as a file to keep."""
    from gemscope.circuits import export_graph, save_graph

    suffix = _LAYOUTS[layout]
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"graph{suffix}"
        (save_graph if layout == "own" else export_graph)(shelf.graph(name), file)
        content = file.read_bytes()
    kind = "application/octet-stream" if layout == "own" else "application/json"
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    saved = {"Content-Disposition": f'attachment; filename="{plain}{suffix}"'}
    return Response(content, media_type=kind, headers=saved)


def _card(of: Graphs, address: str) -> dict[str, Any]:
    """What the card of a feature shows; `r` is None of one that is not indexed."""
    dictionary, index = hub.feature_of(address)
    values = {"address": dictionary, "feature": index, "promoted": None, "r": None}
    if dictionary not in of.bench.known():
        return values
    found = of.features.record(dictionary, index)
    contexts = [c for c in found["contexts"] if c["group"] == "top"][:_CONTEXTS]
    return values | {"r": found | {"contexts": contexts}}


def _promoted(bench: Workbench, address: str, model: str) -> list[str] | None:
    """The tokens that a feature raises most directly, from its weights; None if they are away."""
    from gemscope.steering import promoted_tokens

    dictionary, index = hub.feature_of(address)
    try:
        found = bench.model(model), bench.dictionary(dictionary)
        ids = promoted_tokens(found[0], found[1], [index], 8)
    except InputError:
        return None
    if ids is None:
        return None
    return [marked(found[0].tokenizer.decode([i])) for i in ids[0].tolist()]


def _add_changes(made: APIRouter, of: Graphs) -> None:
    @made.post("/api/graph/{name}/view", responses=_MISTAKES, tags=["graph"])
    def keep_view(name: str, given: ViewIn) -> dict[str, Any]:
        """Keep groups and pins in the graph's file."""
        new = of.shelf.change(name, lambda graph: viewed(graph, given))
        return {"groups": len(new.groups), "pinned": len(new.pinned)}

    @made.post("/api/graph/{name}/name", responses=_MISTAKES, tags=["graph"])
    def rename(name: str, given: NameIn) -> dict[str, Any]:
        """Name a node in the graph's file, and on request its feature in the store, as a note."""
        new = of.shelf.change(name, lambda graph: renamed(graph, given))
        node = new.nodes[new.place(given.id)]
        address, noted = new.address(node), False
        if given.note and address and given.label.strip():
            dictionary, index = hub.feature_of(address)
            if noted := dictionary in of.bench.known():
                note = Note(dictionary=dictionary, feature=index, text=given.label.strip())
                write_note(of.features.store(dictionary), note)
        return {"id": given.id, "label": new.label(node), "noted": noted}

    @made.post("/api/graph/{name}/scores", responses=_MISTAKES, tags=["graph"])
    def scores_json(name: str, given: IdsIn) -> dict[str, Any]:
        """Scores of the whole graph, and as if only the given features explained anything."""
        from gemscope.circuits import graph_scores, subgraph_scores

        graph = of.shelf.graph(name)
        part, shown = subgraph_scores(graph, given.ids), graph_scores(graph)
        return {
            what: {"replacement": one.replacement, "completeness": one.completeness}
            for what, one in (("whole", graph.scores), ("shown", shown), ("part", part))
        }

    @made.post("/api/graph/{name}/intervene", responses=_MISTAKES, tags=["graph"])
    async def intervene(name: str, given: ChangeIn) -> Response:
        """Run the model with features multiplied where the graph has them, errors preserved."""
        graph = await run_in_threadpool(of.shelf.graph, name)
        return _json(await of.worker.run(lambda _stop: intervened(of.bench, graph, given)))
