"""The server: routes of all pages, and what every answer has in common."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from gemscope import __version__
from gemscope.errors import InputError

from . import _compare, _feature, _graph, _map, _microscope, _scope, _search, _steer
from ._render import making_of, page
from ._security import Access, Guard
from ._workbench import Workbench
from ._worker import Busy, Cancelled, Worker, leave_a_core

STATIC = Path(__file__).parent / "static"
PARTS = (_microscope, _feature, _search, _map, _compare, _steer, _graph, _scope)
"""One file a page: `router(bench, worker)` with the page and its JSON twin."""


def create_app(bench: Workbench, access: Access = Access()) -> FastAPI:
    """The explorer of what `bench` has, for readers that `access` lets in."""
    worker = Worker(bench.limits, leave_a_core)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # The model is loaded behind the first pages; a mistake is told where it is asked for.
        loading = asyncio.create_task(_quietly(worker.run(lambda _stop: bench.model())))
        yield
        loading.cancel()
        app.state.ended = worker.close()

    app = FastAPI(
        title="gemscope", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/api/openapi.json",
        description="What the pages show, as JSON. Numbers are those of the command line.",
    )  # fmt: skip
    app.state.access, app.state.bench, app.state.ended = access, bench, True
    for part in PARTS:
        app.include_router(part.router(bench, worker))
    app.add_api_route("/making", _making, response_class=HTMLResponse, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for kind in (InputError, HTTPException, RequestValidationError, Busy, Cancelled, TimeoutError):
        app.add_exception_handler(kind, _told)
    app.add_middleware(Guard, access=access, body=bench.limits.body)
    return app


async def _quietly(work: Any) -> None:
    with suppress(Exception):
        await work


def _making(request: Request) -> Response:
    """How far the first store is, for pages that show it."""
    return page(request, "making.html", store_ready=making_of(request) is None)


async def _told(request: Request, error: Exception) -> Response:
    """A mistake in one sentence: as JSON for programs, as a page for readers."""
    status, sentence = _sentence(error)
    headers = {"Retry-After": "5"} if status == 503 else {}
    headers |= dict(getattr(error, "headers", None) or {})
    if request.url.path.startswith("/api/") or request.url.path.endswith(".json"):
        # Escaped: a sentence may repeat half a character that somebody sent.
        body = json.dumps({"detail": sentence})
        return Response(body, status, headers, media_type="application/json")
    template = "mistake_part.html" if request.headers.get("hx-request") else "mistake.html"
    answer = page(request, template, status=status, sentence=sentence)
    answer.headers.update(headers)
    return answer


def _sentence(error: Exception) -> tuple[int, str]:
    match error:
        case InputError():
            return 422, str(error)
        case Busy():
            return 503, "too many requests wait for the model; try again in some seconds"
        case Cancelled():
            return 503, "the server is closing"
        case TimeoutError():
            return 504, "this took longer than one request may; ask for less"
        case RequestValidationError():
            return 422, "; ".join(_wrong(one) for one in error.errors())
        case HTTPException():
            return error.status_code, str(error.detail)
    raise error


def _wrong(one: dict[str, Any]) -> str:
    return f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}"
