"""The page of a feature, its notes, a text to try it on, and all of it as JSON."""

import json
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from gemscope import hub
from gemscope.errors import InputError
from gemscope.features import Note, write_card

from . import _feature_draw as draw
from ._feature_clusters import Clusters
from ._feature_live import Live
from ._feature_record import at_random, layers, noted, record, write_note
from ._feature_store import KeptStore
from ._render import feature_url, link, page
from ._workbench import Workbench
from ._worker import Worker

_MISTAKES: dict[int | str, dict[str, Any]] = {
    422: {"description": "No such dictionary or feature, or a parameter out of bounds."},
    503: {"description": "Too much model work waits."},
}
Text = Annotated[str, Query(max_length=200_000, description="A text to run the model on.")]


class NoteIn(BaseModel):
    """A note as the page sends it."""

    feature: str = Field(description="ADDRESS/INDEX", max_length=500)
    text: str = Field(min_length=1, max_length=10_000)
    author: str = Field("", max_length=200)
    confidence: float | None = Field(None, ge=0, le=1)
    replaces: str | None = Field(None, max_length=64, description="Key of the note it revises.")


class Features:
    """What the routes share: stores as they are read for pages, and the text box."""

    def __init__(self, bench: Workbench, worker: Worker):
        self.bench, self.worker, self.live = bench, worker, Live(bench)
        self.clusters = Clusters()
        self._stores: dict[str, KeptStore] = {}

    def store(self, address: str) -> KeptStore:
        """The store that has `address`."""
        found = self.bench.store_of(address)
        key = str(found.folder)
        if key not in self._stores:
            self._stores[key] = KeptStore(found)
        return self._stores[key]

    def record(self, address: str, index: int) -> dict[str, Any]:
        """Everything of a feature."""
        store = self.store(address)
        found = record(store, address, index)
        return found | {"clusters": self.clusters.of(store, address, index)}

    async def read(self, address: str, index: int, text: str) -> dict[str, Any]:
        """A text through the feature's column."""
        self.bench.limits.check_text(text)
        if not text.strip():
            raise InputError("the text is empty; type some words")
        row = await run_in_threadpool(lambda: self.store(address).feature(address, index))
        return await self.worker.run(
            lambda _stop: self.live.read(address, index, text, float(row["max"] or 0.0))
        )


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """Pages of features and their twins."""
    made, all_of = APIRouter(), Features(bench, worker)
    _add_notes(made, all_of)
    _add_parts(made, all_of)
    _add_files(made, all_of)
    _add_page(made, all_of)
    return made


def _add_page(made: APIRouter, of: Features) -> None:
    @made.get("/feature/{address:path}/random", include_in_schema=False)
    def at_random_page(address: str) -> Response:
        return RedirectResponse(feature_url(address, at_random(of.store(address), address)), 307)

    @made.get("/feature/{address:path}/go", include_in_schema=False)
    def go(address: str, index: Annotated[int, Query(ge=0, le=10**9)]) -> Response:
        of.store(address).check_feature(address, index)
        return RedirectResponse(feature_url(address, index), 307)

    @made.get("/feature/{address:path}/{index:int}", include_in_schema=False)
    async def feature_page(
        request: Request, address: str, index: int,
        text: Text = "",
        view: Annotated[str, Query(pattern="^(stacked|snippet|full)$")] = "snippet",
        breaks: bool = False,
    ) -> Response:  # fmt: skip
        tried, mistake = None, None
        if text.strip():
            try:
                tried = await of.read(address, index, text)
            except InputError as error:
                # Told beside the box: the rest of the page is there all the same.
                mistake = str(error)

        def made_page() -> Response:
            found = of.record(address, index)
            return page(
                request, "feature.html", r=found, draw=draw, name=f"{address}/{index}",
                here=feature_url(address, index), text=text, tried=tried, mistake=mistake,
                view=view, breaks=breaks, last=found["dictionary"]["d_sae"] - 1,
            )  # fmt: skip

        return await run_in_threadpool(made_page)

    @made.get("/api/feature/{address:path}/{index:int}", responses=_MISTAKES, tags=["feature"])
    def feature_json(address: str, index: int) -> Response:
        """The whole record: statistics, contexts, explanations, notes, relatives."""
        return _json(of.record(address, index))


def _add_parts(made: APIRouter, of: Features) -> None:
    @made.get("/feature/{address:path}/{index:int}/live", include_in_schema=False)
    async def live_part(request: Request, address: str, index: int, text: Text = "") -> Response:
        tried = await of.read(address, index, text) if text.strip() else None
        answer = await run_in_threadpool(
            lambda: page(
                request, "feature_live.html", tried=tried, mistake=None, draw=draw, text=text,
                name=f"{address}/{index}",
            )
        )  # fmt: skip
        answer.headers["HX-Replace-Url"] = link(feature_url(address, index), text=text or None)
        return answer

    @made.get("/api/feature/{address:path}/{index:int}/live", responses=_MISTAKES, tags=["feature"])
    async def live_json(address: str, index: int, text: Text) -> Response:
        """The feature's activation on each token of a text, BOS left out."""
        return _json(await of.read(address, index, text))

    @made.get("/feature/{address:path}/{index:int}/layers", include_in_schema=False)
    def layers_part(request: Request, address: str, index: int) -> Response:
        found = layers(of.store(address), address, index)
        return page(request, "feature_layers.html", found=found)

    @made.get(
        "/api/feature/{address:path}/{index:int}/layers", responses=_MISTAKES, tags=["feature"]
    )
    def layers_json(address: str, index: int) -> Response:
        """The features of the previous and next layer whose directions are nearest."""
        return _json(layers(of.store(address), address, index))


def _add_notes(made: APIRouter, of: Features) -> None:
    @made.get("/feature/{address:path}/{index:int}/notes", include_in_schema=False)
    def notes_part(request: Request, address: str, index: int) -> Response:
        store = of.store(address)
        store.check_feature(address, index)
        return page(
            request, "feature_notes.html", notes=noted(store, address, index),
            name=f"{address}/{index}", here=feature_url(address, index),
        )  # fmt: skip

    @made.post("/api/notes", status_code=201, responses=_MISTAKES, tags=["feature"])
    def add_note(given: NoteIn) -> dict[str, Any]:
        """Keep a note of a feature in its store; nothing automatic changes it."""
        address, index = hub.feature_of(given.feature)
        if not given.text.strip():
            raise InputError("the note is empty; write what the feature is for")
        note = Note(
            dictionary=address, feature=index, text=given.text.strip(),
            author=given.author.strip(), confidence=given.confidence,
            detail={"replaces": given.replaces} if given.replaces else {},
        )  # fmt: skip
        write_note(of.store(address), note)
        return note.json() | {"key": note.key}

    @made.get("/api/notes", responses=_MISTAKES, tags=["feature"])
    def notes_json(feature: Annotated[str, Query(max_length=500)]) -> Response:
        """The notes of a feature, the newest first."""
        address, index = hub.feature_of(feature)
        store = of.store(address)
        store.check_feature(address, index)
        return _json(noted(store, address, index))


def _add_files(made: APIRouter, of: Features) -> None:
    @made.get("/feature/{address:path}/{index:int}/card.html", include_in_schema=False)
    def card_file(address: str, index: int) -> Response:
        found = of.record(address, index)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "card.html"
            write_card(found, file)
            content = file.read_bytes()
        return Response(content, media_type="text/html", headers=_saved(address, index, "html"))

    @made.get("/feature/{address:path}/{index:int}/card.json", include_in_schema=False)
    def json_file(address: str, index: int) -> Response:
        answer = _json(of.record(address, index))
        answer.headers.update(_saved(address, index, "json"))
        return answer


def _saved(address: str, index: int, kind: str) -> dict[str, str]:
    """As a file to keep; its name is of letters that every system takes."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in address)
    return {"Content-Disposition": f'attachment; filename="{plain}-{index}.{kind}"'}


def _json(value: Any) -> Response:
    """JSON in ASCII, which holds any string; numbers that are none are null."""
    try:
        made = json.dumps(value, allow_nan=False)
    except ValueError:
        made = json.dumps(_finite(value), allow_nan=False)
    return Response(made, media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
