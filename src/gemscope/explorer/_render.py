"""Pages from templates: everything escaped, in the reader's language."""

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from gemscope import __version__
from gemscope.features import marked, shade, shown

from ._feature_draw import run

LANGUAGES = {"en": "English", "zh": "中文"}


@cache
def words(language: str) -> dict[str, str]:
    """English to another language, from the files of `locale`."""
    found: dict[str, str] = {}
    folder = files("gemscope.explorer") / "locale"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.startswith(f"{language}_") and file.name.endswith(".json"):
            found |= json.loads(file.read_text("utf-8"))
    return found


def language_of(request: Request) -> str:
    """The reader's choice, or what the browser prefers among ours."""
    for chosen in (request.query_params.get("lang"), request.cookies.get("lang")):
        if chosen in LANGUAGES:
            return chosen
    for part in request.headers.get("accept-language", "").split(","):
        if (known := part.strip()[:2].lower()) in LANGUAGES:
            return known
    return "en"


def translator(language: str) -> Callable[..., str]:
    """`t("{n} features", n=3)` in a language; what has no translation stays English."""
    known = {} if language == "en" else words(language)

    def t(text: str, **values: Any) -> str:
        said = known.get(text, text)
        return said.format(**values) if values else said

    return t


def feature_url(address: str, feature: int) -> str:
    """The page of a feature."""
    return f"/feature/{quote(address)}/{feature}"


def link(path: str, /, **query: Any) -> str:
    """An address of this server; parameters that are None are left out, lists repeated."""
    pairs = {k: v for k, v in query.items() if v is not None}
    return f"{path}?{urlencode(pairs, doseq=True)}" if pairs else path


def short(address: str) -> str:
    """An address without what all of a release share."""
    return address.partition("/")[2] or address


@cache
def environment() -> Environment:
    """Templates with their filters."""
    made = Environment(
        loader=PackageLoader("gemscope.explorer", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {
        "feature_url": feature_url, "link": link, "short": short, "shade": shade, "shown": shown,
        "marked": marked, "run": run, "version": __version__, "languages": LANGUAGES,
    }  # fmt: skip
    return made


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. `t`, `language`, `path` and the page's token are there for every template."""
    language = language_of(request)
    query = {name: request.query_params.getlist(name) for name in request.query_params}
    here = "/" + quote(request.scope["path"].lstrip("/\\"))
    made = environment().get_template(template).render(
        t=translator(language), language=language, path=request.url.path,
        language_links={code: link(here, **{**query, "lang": code}) for code in LANGUAGES},
        first_store=making_of(request), page_token=request.app.state.access.page_token,
        **values,
    )  # fmt: skip
    # A lone surrogate, as half a token may be, has no bytes.
    answer = HTMLResponse(made.encode("utf-8", "replace"), status)
    if request.query_params.get("lang") in LANGUAGES:
        answer.set_cookie("lang", language, samesite="strict")
    return answer


def making_of(request: Request) -> dict[str, Any] | None:
    """What the first store's making is at; None when there is nothing to say."""
    bench = getattr(request.app.state, "bench", None)
    if bench is None or bench.making is None:
        return None
    told: dict[str, Any] | None = bench.making.told()
    if told is None:
        bench.making = None
    return told
