"""Comparing texts: which features of a dictionary fire more in one than in the other."""

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from gemscope import relate
from gemscope.errors import InputError

from ._compare_made import TOP, Asked, Comparisons, Job, Made
from ._compare_sides import PRESETS, Pasted, indexed_names, side
from ._limits import Limits
from ._render import page
from ._workbench import Workbench
from ._worker import Worker

_FIRST = 0.5
"""Seconds a page waits for a comparison before it says how far it is."""


class Params:
    """What the address of a page asks for."""

    def __init__(self, sae: str, a: str, b: str, texts: tuple[str, str], q: float, tokens: int):
        self.sae, self.a, self.b, self.texts, self.q, self.tokens = sae, a, b, texts, q, tokens

    @property
    def empty(self) -> bool:
        """Whether no comparison is asked for."""
        return not (self.a or self.b)

    def asked(self, bench: Workbench, pasted: Pasted) -> Asked:
        """The comparison; refuses what is not offered."""
        for given, name in ((self.sae, "sae"), (self.a, "a"), (self.b, "b")):
            if not given:
                raise InputError(f"{name} is missing: a comparison has a dictionary and two texts")
        sides = [
            side(given, pasted, bench.limits, text)
            for given, text in zip((self.a, self.b), self.texts, strict=True)
        ]
        return Asked(address=self.sae, sides=(sides[0], sides[1]), tokens=self.tokens)

    def query(self) -> dict[str, Any]:
        """The same as parameters of an address, texts in their places."""
        given = {
            "sae": self.sae,
            "a": _whole(self.a, self.texts[0]),
            "b": _whole(self.b, self.texts[1]),
        }
        return given | {"q": f"{self.q:g}", "tokens": self.tokens}


def _whole(given: str, text: str) -> str:
    return given + text if given.endswith("text:") else given


def _most(limits: Limits) -> int:
    """Tokens of each text, at most."""
    most: int = limits.compared
    return most


def _params(limits: Limits) -> Callable[..., Params]:
    """What reads a comparison from the address of a page, within the limits."""
    limit, characters = _most(limits), limits.characters
    named = f"NAME=SOURCE, SOURCE one of {', '.join(PRESETS)}, indexed:NAME or text:..."
    texts = Query(max_length=characters + 100, description=named)

    def params(
        sae: Annotated[str, Query(max_length=500, description="A dictionary of the index.")] = "",
        a: Annotated[str, texts] = "",
        b: Annotated[str, texts] = "",
        a_text: Annotated[
            str, Query(max_length=characters, description="What text: stands for.")
        ] = "",
        b_text: Annotated[
            str, Query(max_length=characters, description="What text: stands for.")
        ] = "",
        q: Annotated[float, Query(ge=0, le=1, description="False discovery rate.")] = 0.05,
        tokens: Annotated[int, Query(ge=1, le=limit, description="Of each text.")] = limit,
    ) -> Params:
        """A comparison from the address of a page."""
        return Params(sae, a, b, (a_text, b_text), q, tokens)

    return params


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/compare`, `/api/compare` and `/api/compare.csv`."""
    routes, pasted = APIRouter(), Pasted(bench.limits)
    comparisons = Comparisons(bench, worker)
    refused: dict[int | str, Any] = {422: {"description": "What was asked is a mistake."}}
    Given = Annotated[Params, Depends(_params(bench.limits))]  # noqa: N806 (a type)

    async def whole(given: Params) -> Made:
        made = await comparisons.ask(given.asked(bench, pasted), bench.limits.seconds)
        if isinstance(made, Job):
            raise TimeoutError
        return made

    @routes.get("/api/compare", responses=refused)
    async def compare_json(given: Given) -> Response:
        """`rows` is what `gemscope compare --json` prints; beside it both texts, how many features
        differ, and what features are called.
        """
        made = await whole(given)
        return Response(
            await run_in_threadpool(_body, made, given.q), media_type="application/json"
        )

    @routes.get("/api/compare.csv", responses=refused)
    async def compare_csv(given: Given) -> Response:
        """Every feature, as `gemscope compare --csv` writes it."""
        made = await whole(given)
        headers = {"Content-Disposition": 'attachment; filename="compared.csv"'}
        body = await run_in_threadpool(made.csv)
        return Response(body, media_type="text/csv; charset=utf-8", headers=headers)

    @routes.post("/api/compare/texts", responses=refused)
    async def keep(
        text: Annotated[str, Body(embed=True, max_length=bench.limits.characters)],
    ) -> dict[str, str]:
        """Keep a text that is too long for an address; `source` stands for it, for a while."""
        return {"source": f"kept:{pasted.keep(text)}"}

    @routes.get("/compare", include_in_schema=False)
    async def compare_page(request: Request, given: Given) -> Response:
        """The page; what htmx asks for is the comparison alone."""
        part = request.headers.get("hx-request") == "true"
        made, job, mistake = None, None, None
        if not given.empty:
            try:
                found = await comparisons.ask(given.asked(bench, pasted), _FIRST)
                made, job = (None, found) if isinstance(found, Job) else (found, None)
            except InputError as error:
                mistake = str(error)
        form = {} if part else await run_in_threadpool(_form, bench, given, pasted)
        tables = await run_in_threadpool(_tables, made, given.q) if made else []
        return page(
            request, "compare_result.html" if part else "compare.html",
            status=422 if mistake else 200, given=given, made=made, job=job, mistake=mistake,
            tables=tables, limits=bench.limits, presets=PRESETS, most=_most(bench.limits), **form,
        )  # fmt: skip

    return routes


def _form(bench: Workbench, given: Params, pasted: Pasted) -> dict[str, Any]:
    """What can be chosen, and what is."""
    known = bench.known()
    indexed: dict[str, None] = {}
    for address in [given.sae] if given.sae in known else known:
        indexed |= dict.fromkeys(indexed_names(bench.store_of(address), address))
    chosen = []
    for source, text, default in zip(
        (given.a, given.b), given.texts, ("code=code", "docstrings=docstrings"), strict=True
    ):
        name, equals, what = source.partition("=")
        shown = text
        if what.startswith("text:"):
            shown, source = what.removeprefix("text:") or text, f"{name}{equals}text:"
        elif what.startswith("kept:"):
            try:
                shown, source = pasted.text(what.removeprefix("kept:")), f"{name}{equals}text:"
            except InputError:
                shown = ""
        chosen.append({"source": source or default, "text": shown})
    return {"addresses": list(known), "indexed": list(indexed), "chosen": chosen}


def _tables(made: Made, q: float) -> list[dict[str, Any]]:
    """The features that are denser on each side, the surest first."""
    one, out = made.one, []
    for key in "ab":
        name = getattr(one, key).name
        shown = one.more_in(key, TOP, q=1.0)
        rows = [
            one.row(feature) | {
                "explanation": made.explanations.get(feature),
                "context": made.contexts.get(feature, {}).get(name),
            }
            for feature in shown
        ]  # fmt: skip
        out.append({"side": key, "name": name, "told": len(one.more_in(key, q=q)), "rows": rows})
    return out


def _body(made: Made, q: float) -> bytes:
    one = made.one
    said = {
        "dictionary": one.address,
        **{
            key: {"name": s.name, "tokens": s.tokens, "documents": s.documents}
            for key, s in (("a", one.a), ("b", one.b))
        },
        "fire": int(one.fires.sum()), "q": q,
        "told": {key: len(one.more_in(key, q=q)) for key in "ab"},
        "rows": relate.comparison_json([one]),
        "explanations": made.explanations,
    }  # fmt: skip
    return json.dumps(_plain(said), ensure_ascii=False).encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """Without numbers that JSON has none for."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
