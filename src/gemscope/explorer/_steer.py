"""Steering: the model with edits of features beside the model without."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gemscope import hub, miniature
from gemscope.errors import InputError
from gemscope.steering import UNITS

from ._microscope import percent
from ._microscope_reading import default
from ._render import page
from ._steer_record import Asked, find, known_of, response, steered
from ._stream import json_lines
from ._workbench import Workbench
from ._worker import Worker

_WRONG: dict[int | str, dict[str, Any]] = {422: {"description": "What is wrong, in a sentence."}}
_STREAM: dict[int | str, dict[str, Any]] = _WRONG | {
    200: {
        "description": 'Lines `{"what": "baseline" or "steered", "text": ...}` as the text comes, '
        'then `{"done": ...}` with what `gemscope steer --json` says.',
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    }
}
_DOSE = "0.25xmax,0.5xmax,1xmax,1.5xmax,2xmax,3xmax,4xmax"


def asked(
    prompt: Annotated[str, Query(description="The text that the model goes on from.")] = "",
    feature: Annotated[list[str], Query(description="ADDRESS/INDEX of each edit.")] = [],  # noqa: B006
    strength: Annotated[list[str], Query(description="Such as 4, 0.5xmax, 0.1xnorm or 2xcurrent; once, or once a feature; empty for modes without.")] = [],  # noqa: B006, E501
    mode: Annotated[list[str], Query(description="Once, or once a feature; add by default.")] = [],  # noqa: B006
    positions: Annotated[list[str], Query(description="all, prompt, generated, last, spans such as 3:7, joined by +; once, or once a feature.")] = [],  # noqa: B006, E501
    seed: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    max_new_tokens: Annotated[int, Query(ge=1, le=100_000)] = 40,
    temperature: Annotated[float, Query(ge=0, le=100)] = 0.0,
    chat: bool = False,
) -> Asked:  # fmt: skip
    """The settings in an address."""
    return Asked(
        prompt=prompt, features=tuple(feature), modes=tuple(mode), strengths=tuple(strength),
        positions=tuple(positions), seed=seed, max_new_tokens=max_new_tokens,
        temperature=temperature, chat=chat,
    )  # fmt: skip


Settings = Annotated[Asked, Depends(asked)]


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/steer`, `/api/steer` and `/api/dose`."""
    made = APIRouter()
    add_pages(made, bench)

    @made.get("/api/steer", responses=_STREAM, tags=["steer"], response_class=StreamingResponse)
    async def api_steer(settings: Settings) -> Response:
        """Generate without and with edits, from the same seed. Whoever leaves ends it."""
        pieces = worker.stream(lambda stop, put: steered(bench, settings, stop, put))
        # What is refused is refused with the first piece, before an answer has begun.
        first = await anext(pieces)
        lines = json_lines(first, pieces, too_long="ask for fewer tokens")
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @made.get("/api/dose", responses=_WRONG, tags=["steer"])
    async def api_dose(
        feature: Annotated[str, Query(description="ADDRESS/INDEX.")],
        mode: str = "add",
        strengths: Annotated[str, Query(description="With commas between.")] = _DOSE,
        positions: str = "all",
        prompt: Annotated[list[str], Query(description="Neutral ones by default.")] = [],  # noqa: B006
        max_new_tokens: Annotated[int, Query(ge=1, le=100_000)] = 20,
        seed: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    ) -> dict[str, Any]:
        """What steering with a feature does and costs, strength by strength: the record of
        `gemscope dose --json`; `sizes` are the strengths as numbers of one unit.
        """
        return await worker.run(
            lambda stop: response(
                bench, feature, mode, strengths.split(","), positions, stop, prompt,
                max_new_tokens=max_new_tokens, seed=seed,
            )
        )  # fmt: skip

    return made


def add_pages(made: APIRouter, bench: Workbench) -> None:
    """The page, the rows that are added to it, and what is found to add."""
    templates: dict[str, bool] = {}

    @made.get("/steer", include_in_schema=False)
    async def steer_page(request: Request, settings: Settings) -> Response:
        values = await run_in_threadpool(_page, bench, settings, templates)
        return page(request, "steer.html", percent=percent, **values)

    @made.get("/steer/row", include_in_schema=False)
    async def steer_row(request: Request, feature: str) -> Response:
        one = await run_in_threadpool(_row, bench, feature, "add", "1xmax", "all")
        return page(request, "steer_row.html", one=one, percent=percent, modes=list(UNITS))

    @made.get("/steer/find", include_in_schema=False)
    async def steer_find(request: Request, q: str = "", address: str = "") -> Response:
        found = await run_in_threadpool(find, bench, q, address)
        return page(request, "steer_found.html", found=found, q=q, percent=percent)


def _page(bench: Workbench, settings: Asked, templates: dict[str, bool]) -> dict[str, Any]:
    """What the page shows: nothing is generated until somebody asks."""
    rows, wrong = [], []
    for given in settings.restored()[: bench.limits.edits]:
        try:
            rows.append(_row(bench, *given))
        except InputError as error:
            wrong.append(str(error))
    addresses = list(bench.known()) or [default(bench)]
    first = rows[0]["address"] if rows else addresses[0]
    return {
        "asked": settings, "rows": rows, "wrong": wrong, "modes": list(UNITS),
        "units": {str(mode): sorted(map(str, units)) for mode, units in UNITS.items()},
        "addresses": addresses, "default": default(bench), "limits": bench.limits,
        "chat": _has_template(bench, first, templates),
    }  # fmt: skip


def _row(bench: Workbench, name: str, mode: str, strength: str, positions: str) -> dict[str, Any]:
    """A feature and how it is edited; in units of its maximum only where it has one."""
    known = known_of(bench, name)
    if strength == "1xmax" and not known["maximum"]:
        strength = "4"
    takes = UNITS.get(mode, True)  # type: ignore[call-overload]
    return known | {"mode": mode, "strength": strength if takes else "", "positions": positions}


def _has_template(bench: Workbench, address: str, known: dict[str, bool]) -> bool:
    """Whether the model's tokenizer knows how a chat is written."""
    facts = bench.facts(address)
    name = facts["model"]
    if name not in known:
        if facts["indexed"]:
            tokenizer = bench.store_of(address).tokenizer(address)
            known[name] = bool(getattr(tokenizer, "chat_template", None))
        else:
            # Of the bundled model it is known; of others it is asked when they are loaded.
            known[name] = hub.model_source(name) != str(miniature.MODEL)
    return known[name]
