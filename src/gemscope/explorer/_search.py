"""Searching: what `gemscope search` finds, as one types, over all open stores."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from gemscope import features, hub
from gemscope.errors import InputError
from gemscope.features import Among, Found, Store

from ._render import page
from ._search_tops import Tops
from ._workbench import Workbench
from ._worker import Cancelled, Worker

Kind = Literal["words", "text", "promotes", "like"]
UNITS = {
    "words": "match", "text": "share of max", "promotes": "logit, in s.d.", "like": "cosine",
    "where": "density",
}  # fmt: skip
"""What the score of each kind of search is in, as the command's table heads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One search."""

    query: str = ""
    kind: Kind = "words"
    where: str | None = None
    addresses: tuple[str, ...] = ()
    limit: int = 20
    max_density: float = 0.01
    """Of a search by text: denser features are hidden."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to look for."""
        return not self.query.strip() and self.where is None

    @property
    def by(self) -> str:
        """The kind of search that is made: without a query it is by statistics alone."""
        return self.kind if self.query.strip() else "where"


async def found(bench: Workbench, worker: Worker, asked: Asked) -> list[Found]:
    """What `gemscope search` finds, best first; of several stores all results in one order."""
    shares = await run_in_threadpool(_shares, bench, asked)
    if asked.by == "text":
        bench.limits.check_text(asked.query)
        made: list[Found] = await worker.run(lambda stop: _on_text(bench, shares, asked, stop))
        return made
    return await run_in_threadpool(_without_model, shares, asked)


def _shares(bench: Workbench, asked: Asked) -> list[tuple[Store, Among]]:
    """Which dictionaries are looked through in which store: each in the first that has it."""
    for address in asked.addresses:
        bench.store_of(address)
    taken: set[str] = set()
    out = []
    for store in bench.stores:
        here = [d["address"] for d in store.dictionaries()]
        own = [a for a in here if a not in taken]
        taken.update(here)
        chosen = [a for a in own if not asked.addresses or a in asked.addresses]
        if not chosen:
            continue
        # Named only where some are left out: as the command, which then has an index to ask.
        whole = not asked.addresses and len(own) == len(here)
        named = () if whole else tuple(chosen)
        out.append((store, Among(addresses=named, where=asked.where, limit=asked.limit)))
    if not out:
        raise InputError("no dictionary is indexed yet; gemscope index adds one")
    return out


def _without_model(shares: Sequence[tuple[Store, Among]], asked: Asked) -> list[Found]:
    if asked.by == "like":
        address, feature = hub.feature_of(asked.query.strip())
        own = [(s, a) for s, a in shares if _has(s, address)]
        if not own:
            raise InputError(
                f"{address} is not in the stores that are looked through; give the address of an "
                "indexed dictionary, a slash and the number of a feature"
            )
        # Directions of different models are not compared: the store of the feature answers.
        store, among = own[0]
        return features.search_like(store, address, feature, among)
    parts = []
    for store, among in shares:
        if asked.by == "promotes":
            parts.append(features.search_promotes(store, asked.query, among))
        elif asked.by == "words":
            parts.append(features.search(store, asked.query, among))
        else:
            parts.append(features.search_where(store, among))
    return _merged(parts, asked.limit)


def _has(store: Store, address: str) -> bool:
    return any(d["address"] == address for d in store.dictionaries())


def _merged(parts: Sequence[list[Found]], limit: int) -> list[Found]:
    if len(parts) == 1:
        return parts[0]
    every = [one for part in parts for one in part]
    return sorted(every, key=lambda f: (-f.score, f.address, f.feature))[:limit]


def _on_text(
    bench: Workbench, shares: Sequence[tuple[Store, Among]], asked: Asked, stop: Event
) -> list[Found]:
    """A few dictionaries at a time, so that those in memory are never more than the limit."""
    known = [
        (store, among, d) for store, among in shares for d in store.dictionaries()
        if not among.addresses or d["address"] in among.addresses
    ]  # fmt: skip
    model = bench.model_of(d["address"] for _, _, d in known)
    if (n := len(model.tokens([asked.query]).ids[0])) > bench.limits.tokens:
        raise InputError(f"the text has {n:,} tokens, and {bench.limits.tokens:,} are read; cut it")
    parts = []
    for store, among in shares:
        own = [d["address"] for s, _, d in known if s is store]
        for first in range(0, len(own), bench.limits.dictionaries):
            if stop.is_set():
                raise Cancelled
            some = own[first : first + bench.limits.dictionaries]
            saes = [(a, bench.dictionary(a).to(model.device)) for a in some]
            one = Among(addresses=tuple(some), where=among.where, limit=among.limit)
            parts.append(
                features.search_text(
                    store, model, saes, asked.query, one, max_density=asked.max_density
                )
            )
    return _merged(parts, asked.limit)


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/search` and `/api/search`."""
    routes, tops, limits = APIRouter(), Tops(), bench.limits
    query = Query(
        max_length=limits.characters, description="Words, a text, a token, or ADDRESS/INDEX."
    )
    conditions = Query(max_length=1_000, description="A condition on statistics in SQL, such as "
                       "density < 0.01 AND max > 5.")  # fmt: skip
    among = Query(alias="in", max_length=64, description="Only these dictionaries, by address.")

    def asked(
        q: Annotated[str, query] = "",
        kind: Kind = "words",
        where: Annotated[str, conditions] = "",
        addresses: Annotated[list[str], among] = [],  # noqa: B006 (FastAPI copies it)
        limit: Annotated[int, Query(ge=1, le=limits.results)] = min(20, limits.results),
        max_density: Annotated[float, Query(gt=0, le=1)] = 0.01,
    ) -> Asked:
        """A search from the address of a page."""
        return Asked(
            query=q, kind=kind, where=where.strip() or None, limit=limit,
            addresses=tuple(dict.fromkeys(a for a in addresses if a)), max_density=max_density,
        )  # fmt: skip

    Search = Annotated[Asked, Depends(asked)]  # noqa: N806 (a type)

    @routes.get("/api/search", responses={422: {"description": "What was asked is a mistake."}})
    async def search_json(search: Search) -> dict[str, Any]:
        """`found` is what `gemscope search --json` prints; `score` says what its scores are in."""
        if search.empty:
            raise InputError("nothing to look for: give q, where, or both")
        made = await found(bench, worker, search)
        return {"kind": search.by, "unit": UNITS[search.by], "found": [f.json() for f in made]}

    @routes.get("/search", include_in_schema=False)
    async def search_page(request: Request, search: Search) -> Response:
        """The page; what htmx asks for is the results alone."""
        made, contexts, mistake = [], {}, None
        if not search.empty:
            try:
                made = await found(bench, worker, search)
                contexts = await run_in_threadpool(tops.of, bench, made)
            except InputError as error:
                mistake = str(error)
        part = request.headers.get("hx-request") == "true"
        return page(
            request, "search_results.html" if part else "search.html",
            status=422 if mistake else 200, asked=search, found=made, tops=contexts,
            unit=UNITS[search.by], mistake=mistake, limits=limits,
            addresses=[] if part else list(bench.known()), stores=len(bench.stores),
        )  # fmt: skip

    return routes
