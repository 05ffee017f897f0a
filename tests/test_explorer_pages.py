"""What holds of every page: escaped, whole without a network, light, in both languages."""

import ast
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from explorer import pages_of
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

import gemscope.explorer
from gemscope.explorer import Access, Workbench, create_app
from gemscope.explorer._render import words
from gemscope.features import Explanation, Note, Store

FOLDER = Path(gemscope.explorer.__file__).parent
TEMPLATES = sorted((FOLDER / "templates").glob("*.html"))
SCRIPTS = sorted(f for f in (FOLDER / "static").rglob("*") if f.suffix in (".js", ".css", ".svg"))
OWN = [f for f in SCRIPTS if f.parent.name != "vendor"]
# Each would run, or open a way to, if it were ever put into a page as it is.
HOSTILE = (
    "<script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=1">',
    "'><svg/onload=window.hit=1>",
    "</textarea></script><script>window.hit=1</script>",
    "{{7*7}}${7*7}<%= 7*7 %>{% raw %}",
    "javascript:window.hit=1",
    '" autofocus onfocus="window.hit=1" x="',
    "\u202e<b>turned</b>\x00\x08\ufffe",
    "]]><!--<style>*{display:none}</style>",
    'x" hx-get="/api/notes" hx-trigger="load',
)


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.said = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = [tag] if tag in ("script", "style") else []

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if self.inside and data.strip():
            self.said.append((self.inside[0], data))


def check_page(text):
    """That nothing was put into a page that runs or loads."""
    read = Reader(text)
    assert read.said == [], "script or style between tags"
    for tag, attributes in read.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "b ", "style"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert not name.startswith(("hx-on", "hx-vals-js")), (tag, name)
            if name in ("src", "href", "action", "hx-get", "hx-post", "formaction", "poster"):
                where = (value or "").strip().lower()
                assert where.startswith(("/", "?", "#")) or where == "", (tag, name, value)
                assert not where.startswith("//"), (tag, name, value)
            if name == "hx-trigger":
                assert "[" not in value, "a filter is a script"


@pytest.fixture(scope="module")
def hostile_store(small_store, indexed, tmp_path_factory):
    """A store with notes and explanations that attack."""
    folder = tmp_path_factory.mktemp("hostile") / "store"
    shutil.copytree(small_store, folder)
    store = Store.open(folder)
    store.add_notes(
        [
            Note(dictionary=a, feature=i, text=text)
            for a in indexed
            for i, text in enumerate(HOSTILE)
        ]
    )
    store.add_explanations(
        [
            Explanation(dictionary=a, feature=i, text=text, method="model", author=text)
            for a in indexed
            for i, text in enumerate(HOSTILE)
        ]
    )
    return store


@pytest.fixture(scope="module")
def hostile(hostile_store):
    app = create_app(Workbench([hostile_store]), Access())
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def routes(client):
    """Every page and JSON that is read, however deep its router is."""
    found, left = [], list(client.app.routes)
    while left:
        one = left.pop(0)
        left += getattr(getattr(one, "original_router", None), "routes", [])
        if isinstance(one, APIRoute) and "GET" in one.methods:
            found.append(one)
    assert len(found) > 12
    return found


def filled(route, address, index=0):
    def value(match):
        return quote(address) if match[1] == "address" else str(index)

    return re.sub(r"\{(\w+)(:\w+)?\}", value, route.path)


def parameters(route):
    found, left = [], [route.dependant]
    while left:
        one = left.pop()
        found += [p.alias for p in one.query_params]
        left += one.dependencies
    return found


@pytest.mark.slow
def test_nothing_that_readers_send_is_markup(hostile, indexed):
    for route in routes(hostile):
        for text in HOSTILE:
            # Alone, and all at once.
            names = parameters(route)
            for query in [{n: text} for n in names] + [dict.fromkeys(names, text)] + [{text: text}]:
                path = filled(route, indexed[0])
                answer = hostile.get(f"{path}?{urlencode(query)}", follow_redirects=False)
                assert answer.status_code < 500, (path, query, answer.text)
                if answer.headers.get("content-type", "").startswith("text/html"):
                    if not path.endswith("card.html"):
                        check_page(answer.text)
                else:
                    check_plain(answer)


def check_plain(answer):
    """That a browser does not take an answer for a page."""
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    if 300 <= answer.status_code < 400:
        assert re.match(r"/(?!/)", answer.headers["location"]), answer.headers["location"]


def test_no_address_is_markup(hostile):
    for route in routes(hostile):
        if "{address" in route.path:
            for text in (
                *HOSTILE,
                "../../etc/passwd",
                "%2e%2e/x",
                "a//b",
                "x" * 3_000,
                "miniature",
            ):
                answer = hostile.get(filled(route, text), follow_redirects=False)
                assert answer.status_code < 500, (route.path, text)
                if answer.headers.get("content-type", "").startswith("text/html"):
                    check_page(answer.text)


def test_nothing_that_is_stored_is_markup(hostile, indexed):
    for route in routes(hostile):
        if "{index" in route.path and not route.path.endswith("card.html"):
            for index in range(len(HOSTILE)):
                answer = hostile.get(
                    filled(route, indexed[0], index), params={"text": "def f(): <b>"}
                )
                assert answer.status_code < 500, (route.path, index)
                if answer.headers["content-type"].startswith("text/html"):
                    check_page(answer.text)
    for text in HOSTILE:
        check_page(hostile.get("/search", params={"q": text}).text)


@pytest.mark.parametrize("file", [*TEMPLATES, *OWN], ids=lambda f: f.name)
def test_nothing_names_an_outside_address(file):
    text = file.read_text("utf-8")
    # Names of things, which nobody fetches.
    plain = re.sub(r"http://www\.w3\.org/\S+", "", text)
    if file.name.startswith("site"):  # pages that are written to a folder, see their own tests
        plain = re.sub(r"https?://\{\{", "", plain)
    assert not re.search(r"(?<![:\w])(https?:)?//[\w-]+\.\w", plain), file


@pytest.mark.parametrize("file", [*SCRIPTS], ids=lambda f: f.name)
def test_scripts_do_not_evaluate(file):
    text = file.read_text("utf-8")
    if file.suffix == ".js" and file in OWN:
        assert not re.search(r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write", text)
        assert not re.search(r"\beval\(|new Function|setTimeout\(\s*[\"']", text)
    if file.suffix == ".css":
        assert "@import" not in text
        assert not re.search(r"url\((?![\"']?data:)", text)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda f: f.name)
def test_templates_escape_everything(file):
    text = file.read_text("utf-8")
    assert not re.search(r"\|\s*safe\b|autoescape\s+false|Markup", text), file
    assert not re.search(r"<script(?![^>]*\bsrc=)", text) or file.name.startswith("site")
    assert not re.search(r"\son\w+\s*=\s*[\"']", text), file


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda f: f.name)
def test_every_word_has_a_chinese_one(file):
    known = words("zh")
    quoted = r"""\bt\(\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    said = {ast.literal_eval(one) for one in re.findall(quoted, file.read_text("utf-8"))}
    missing = said - known.keys()
    assert not missing, missing


def test_words_keep_their_values():
    for english, chinese in words("zh").items():
        names = set(re.findall(r"\{(\w*)[^}]*\}", english))
        assert names == set(re.findall(r"\{(\w*)[^}]*\}", chinese)), english


def test_a_page_is_light(hostile, indexed):
    """Scripts and styles of each page, as they are sent."""
    for name, path in pages_of(indexed).items():
        read = Reader(hostile.get(path).text)
        files = {a.get("src") for t, a in read.tags if t == "script"}
        files |= {a["href"] for t, a in read.tags if t == "link" and a.get("rel") == "stylesheet"}
        size = sum(len(hostile.get(file).content) for file in files)
        assert size < 200_000, (name, size, files)


def test_every_page_is_found_and_says_its_language(hostile, indexed):
    for path in pages_of(indexed).values():
        for language, tag in (("en-GB", "en"), ("zh-CN,zh;q=0.9", "zh-Hans")):
            answer = hostile.get(path, headers={"Accept-Language": language})
            assert answer.status_code == 200, (path, answer.text)
            assert f'<html lang="{tag}">' in answer.text
            check_page(answer.text)


def test_a_choice_of_language_keeps_the_rest(hostile):
    answer = hostile.get("/search?q=a&in=b&in=c&path=1&lang=zh")
    link = next(a["href"] for t, a in Reader(answer.text).tags if a.get("hreflang") == "en")
    assert link == "/search?q=a&in=b&in=c&path=1&lang=en"
    assert 'lang="zh-Hans"' in hostile.get("/scope").text
    hostile.cookies.clear()


def test_what_is_not_there_is_told_in_a_page(hostile):
    answer = hostile.get("/nothing/<b>")
    assert (answer.status_code, "<b>" in answer.text, "<h1>" in answer.text) == (404, False, True)
    assert hostile.get("/api/nothing").json() == {"detail": "Not Found"}
    part = hostile.get("/scope?release=none", headers={"HX-Request": "true"})
    assert part.status_code == 422
    assert part.text.startswith('<p class="mistake" role="alert">no release')
    wrong = hostile.get("/scope?colour=none")
    assert (wrong.status_code, "colour" in wrong.text) == (422, True)


@pytest.mark.slow
def test_the_api_never_fails(hostile_store):
    """Schemathesis makes requests from what the API says of itself."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    access = Access()
    app = create_app(Workbench([hostile_store]), access)
    with TestClient(app, base_url="http://localhost"):
        schema = schemathesis.openapi.from_asgi(
            "/api/openapi.json", app, headers={"host": "localhost"}
        )
        operations = [o.ok() for o in schema.get_all_operations()]
        assert len(operations) > 5
        for operation in operations:

            @given(case=operation.as_strategy())
            @settings(max_examples=25, deadline=None, derandomize=True, database=None,
                      suppress_health_check=list(HealthCheck), phases=[Phase.generate])  # fmt: skip
            def tried(case):
                case.headers = {
                    **(case.headers or {}),
                    "x-gemscope": access.page_token,
                    "host": "localhost",
                }
                answer = case.call()
                assert answer.status_code < 500 or answer.status_code in (503, 504), answer.content
                if answer.status_code not in (503, 504):
                    case.validate_response(answer, checks=[not_a_server_error])

            tried()
