"""Maps of dictionaries: features near those they fire with, and the tree of their clusters."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from gemscope.errors import InputError

from ._map_made import Made, Maps, On
from ._map_tree import Group
from ._render import page
from ._workbench import Workbench
from ._worker import Worker

FIRST = 6
"""Features that are shown of a cluster, the most typical first."""


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/map`, `/map/{address}` and `/api/map/{address}`."""
    maps = Maps(bench)
    routes = APIRouter(lifespan=maps.lifespan)
    answers: dict[int | str, Any] = {
        202: {"description": "It is being made: `{state, seconds}`; ask again."},
        422: {"description": "What was asked is a mistake."},
    }
    where = Path(max_length=500, description="A dictionary that was indexed with its activations.")
    alike = Query(description="What makes features alike, as `gemscope cluster --on`.")

    @routes.get("/api/map/{address:path}", responses=answers)
    async def map_json(
        address: Annotated[str, where],
        on: Annotated[On, alike] = "together",
        tree: Annotated[bool, Query(description="With the tree of merges.")] = False,
    ) -> Response:
        """What `gemscope cluster --json --map` prints, each feature with its density, its maximum
        and what it is called.
        """
        state = await run_in_threadpool(maps.state, address, on)
        if state.made is None:
            return JSONResponse({"state": state.name, "seconds": round(state.seconds, 1)}, 202)
        body = await run_in_threadpool(_body, maps, state.made.record, tree)
        return Response(body, media_type="application/json")

    @routes.get("/map", include_in_schema=False)
    async def choose(request: Request) -> Response:
        known = await run_in_threadpool(_choices, bench)
        return page(request, "map.html", known=known)

    @routes.get("/map/{address:path}", include_in_schema=False)
    async def map_page(
        request: Request,
        address: Annotated[str, where],
        on: Annotated[On, alike] = "together",
        group: Annotated[int | None, Query(ge=0, description="A group of the tree.")] = None,
        cluster: Annotated[int | None, Query(ge=0, description="To be shown on the map.")] = None,
    ) -> Response:
        """The page; what htmx asks for is the map alone, or what is in a group of its tree."""
        part = request.headers.get("hx-request") == "true"
        mistake = state = shown = None
        try:
            state = await run_in_threadpool(maps.state, address, on)
            if state.made is not None:
                shown = await run_in_threadpool(_group, state.made, group or 0)
        except InputError as error:
            mistake = str(error)
        template = "map_body.html" if part else "map_one.html"
        if part and group is not None and shown is not None:
            template = "map_group.html"
        said = await run_in_threadpool(maps.said, address, _named(shown)) if shown else {}
        return page(
            request, template, status=422 if mistake else 200, address=address, on=on,
            mistake=mistake, state=state, group=shown, chosen=group, cluster=cluster,
            said=said, first=FIRST,
        )  # fmt: skip

    return routes


def _group(made: Made, number: int) -> Group:
    tree = made.tree
    if number >= len(tree.groups):
        raise InputError(f"no group {number}: this tree has 0 to {len(tree.groups) - 1}")
    return tree.groups[number]


def _named(group: Group) -> list[int]:
    """The features that are shown of a group: the most typical of its clusters, and those alone."""
    return [f for one in group.clusters for f in one["members"][:FIRST]] + group.alone


def _choices(bench: Workbench) -> list[dict[str, Any]]:
    """Every dictionary, and whether its activations were kept: they are what maps are made of."""
    found = []
    for address, known in bench.known().items():
        store = bench.store_of(address)
        kept = (store.folder / "activations" / known["collected"] / "index.json").is_file()
        found.append(known | {"kept": kept})
    return found


def _body(maps: Maps, record: dict[str, Any], tree: bool) -> bytes:
    out = {k: v for k, v in record.items() if tree or k not in ("tree", "leaves")}
    address = record["dictionary"]
    said = maps.said(address, [one["feature"] for one in record["map"]])
    figures = maps.figures(address)
    out["map"] = [
        one | {
            "density": figures[one["feature"]][0], "max": figures[one["feature"]][1],
            "explanation": said.get(one["feature"]),
        }
        for one in record["map"]
    ]  # fmt: skip
    return json.dumps(out, ensure_ascii=False).encode("utf-8", "replace")
