"""The start page: a text under the microscope."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gemscope.errors import InputError

from ._microscope_reading import Readings, chosen_of, record
from ._microscope_view import SORTS, Asked, choices, view
from ._render import link, page
from ._workbench import Workbench
from ._worker import Worker

EXAMPLES = (
    ("Function", 'def area(width, height):\n    """Return the area of a rectangle."""\n'
     "    if width < 0 or height < 0:\n        raise ValueError(\"negative\")\n"
     "    return width * height\n"),
    ("Docstring", '"""Read lines from a file object.\n\n    Each line ends with a newline, except '
     "perhaps the last one.\n    Raises OSError if the file cannot be opened.\n    \"\"\"\n"),
    ("Class", "class Stack:\n    def __init__(self, items=()):\n        self._items = list(items)\n"
     "\n    def push(self, item):\n        self._items.append(item)\n"),
    ("Prose", "The old lighthouse keeper wrote one sentence a day, and on Sundays he wrote two."),
    ("Scripts", 'names = {"zh": "显微镜", "ar": "مجهر", "emoji": "🔬"}\n'),
)  # fmt: skip
"""Texts to begin with."""

_PARTS = {"reading": "microscope_reading.html", "panel": "microscope_panel.html"}
_WRONG: dict[int | str, dict[str, Any]] = {422: {"description": "What is wrong, in a sentence."}}


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/` and `/api/look`."""
    made = APIRouter()
    readings = Readings(bench)

    @made.get("/", include_in_schema=False)
    async def microscope(
        request: Request,
        text: str | None = None,
        sae: Annotated[list[str], Query()] = [],  # noqa: B006 (FastAPI copies it)
        feature: str = "",
        token: int | None = None,
        sort: Literal["strength", "density", "frequency"] = "strength",
        dense: Annotated[float, Query(gt=0, le=1)] = 0.01,
        top: Annotated[int, Query(ge=1, le=50)] = 8,
    ) -> Response:
        part = request.headers.get("hx-target", "")
        if part not in _PARTS or request.headers.get("hx-history-restore-request"):
            part = ""
        first = text is None
        asked = Asked(
            EXAMPLES[0][1] if text is None else text, tuple(sae), feature, token, sort, dense, top
        )
        # The first page comes at once, and asks for its reading when it is there.
        shown, sentence, status = None, None, 200
        if not first:
            try:
                shown = await worker.run(
                    lambda _stop: view(bench, readings, asked, colours=part != "panel")
                )
            except InputError as error:
                sentence, status = str(error), 422
        around = {} if part else await run_in_threadpool(_around, bench, asked)
        answer = page(
            request, _PARTS.get(part, "microscope.html"), status=status, asked=asked, shown=shown,
            sentence=sentence, sorts=SORTS, percent=percent, first=first,
            here=link("/", **asked.query()), twin=_twin(asked), **around,
        )  # fmt: skip
        answer.headers["Vary"] = "HX-Request, HX-Target"
        return answer

    @made.get("/api/look", responses=_WRONG, tags=["microscope"])
    async def api_look(
        text: Annotated[str, Query(description="The text, read as one context.")],
        sae: Annotated[list[str], Query(description="Addresses; the widest by default.")] = [],  # noqa: B006
        top: Annotated[int, Query(ge=1, le=50, description="Features a token.")] = 5,
        max_density: Annotated[float, Query(gt=0, le=1, description="Features that fire on a larger share of the indexed tokens are left out; 1 shows all.")] = 0.01,  # noqa: E501
    ) -> dict[str, Any]:  # fmt: skip
        """Per token the strongest features of each dictionary: values of `gemscope look`, with
        density, maximum, explanation and score from the store.
        """
        return await worker.run(
            lambda _stop: record(bench, readings, text, sae, top=top, max_density=max_density)
        )

    return made


def percent(share: float | None) -> str:
    """A share in percent with three digits."""
    return "" if share is None else f"{100 * share:.3g}%"


def _twin(asked: Asked) -> str:
    return link(
        "/api/look", text=asked.text, sae=list(asked.saes), top=asked.top, max_density=asked.dense
    )


def _around(bench: Workbench, asked: Asked) -> dict[str, Any]:
    """What the page shows beside the reading: dictionaries to choose, and a store in the making."""
    groups, sets = choices(bench)
    try:
        chosen = chosen_of(bench, asked.saes)
    except InputError:
        # The sentence stands where the reading would be.
        chosen = list(asked.saes)
    return {
        "groups": groups, "sets": sets, "chosen": chosen, "bare": not bench.known(),
        "examples": EXAMPLES, "limits": bench.limits,
    }  # fmt: skip
