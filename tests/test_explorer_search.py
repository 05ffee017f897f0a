"""Searching on a page finds what the command finds, and mistakes are sentences."""

import json
import re

import pytest
from starlette.testclient import TestClient

from gemscope.explorer import Limits, Workbench, create_app
from gemscope.features import Explanation, Store

HOST = "http://127.0.0.1"


@pytest.fixture(scope="module")
def client(small_store):
    """A reader of an explorer of `small_store`."""
    return TestClient(create_app(Workbench([Store.open(small_store)])), base_url=HOST)


def found(client, **asked):
    answer = client.get("/api/search", params=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def hits(page):
    """Features of a page's results, in order."""
    return re.findall(r'class="hit" href="/feature/([^"]+)"', page)


def test_each_kind_is_the_commands(client, command, small_store, indexed):
    like = f"{indexed[0]}/5"
    kinds = [
        (["return"], {"q": "return"}, "match"),
        (["return", "--where", "density < 0.01", "--limit", "7"],
         {"q": "return", "where": "density < 0.01", "limit": 7}, "match"),
        (["--promotes", "return"], {"q": "return", "kind": "promotes"}, "logit, in s.d."),
        (["--like", like], {"q": like, "kind": "like"}, "cosine"),
        (["--like", like, "--in", indexed[1]],
         {"q": like, "kind": "like", "in": indexed[1]}, "cosine"),
        (["--where", "density > 0.05"], {"where": "density > 0.05"}, "density"),
        (["--text", "for i in range(10):", "--max-density", "0.1"],
         {"q": "for i in range(10):", "kind": "text", "max_density": 0.1}, "share of max"),
    ]  # fmt: skip
    for arguments, asked, unit in kinds:
        code, out, err = command("search", small_store, "--json", *arguments)
        assert code == 0, err
        said = found(client, **asked)
        assert said["unit"] == unit
        assert said["found"] == json.loads(out), asked
        assert said["found"], asked
        # The page shows the same, in the same order.
        page = client.get("/search", params=asked)
        names = [f"{f['address']}/{f['feature']}" for f in said["found"]]
        assert hits(page.text) == names


def test_text_is_searched_a_few_dictionaries_at_a_time(small_store):
    asked = {"q": "import os\nreturn self", "kind": "text", "max_density": 0.2}
    answers = []
    for few in (1, 8):
        bench = Workbench([Store.open(small_store)], limits=Limits(dictionaries=few))
        answers.append(found(TestClient(create_app(bench), base_url=HOST), **asked))
    assert answers[0] == answers[1]
    assert len({f["address"] for f in answers[0]["found"]}) == 2


def test_a_text_of_more_tokens_than_are_read_is_refused(small_store):
    bench = Workbench([Store.open(small_store)], limits=Limits(tokens=3))
    answer = TestClient(create_app(bench), base_url=HOST).get(
        "/api/search", params={"q": "a b c d e f", "kind": "text"}
    )
    assert answer.status_code == 422
    assert "and 3 are read; cut it" in answer.json()["detail"]


def test_stores_are_searched_together_and_a_dictionary_once(client, small_store, own_store):
    both = Workbench([Store.open(small_store), Store.open(own_store)])
    together = TestClient(create_app(both), base_url=HOST)
    for asked in ({"q": "return"}, {"where": "max > 1", "limit": 50}):
        assert found(together, **asked) == found(client, **asked)


def test_only_the_results_come_where_htmx_asks(client):
    whole = client.get("/search", params={"q": "return"}).text
    part = client.get("/search", params={"q": "return"}, headers={"HX-Request": "true"}).text
    assert "<html" in whole
    assert "<html" not in part
    assert hits(part) == hits(whole) != []
    # A form that works without scripts, its state in the address.
    assert 'action="/search" method="get"' in whole
    assert 'value="return"' in whole


def test_results_show_their_strongest_context(client, small_store, indexed):
    page = client.get("/search", params={"where": "max > 1", "in": indexed[0], "limit": 5}).text
    first = found(client, where="max > 1", limit=5, **{"in": indexed[0]})["found"][0]
    (peak,) = (
        c["value"] for c in Store.open(small_store).contexts(indexed[0], first["feature"])
        if c["group"] == "top" and c["rank"] == 0
    )  # fmt: skip
    shown = re.findall(r'style="background: rgba\(var\(--fire\), ([\d.]+)\)" title="([^"]+)"', page)
    assert ("1.00", f"{peak:.3g}") in shown
    assert f"kind=like&amp;q={indexed[0].replace('/', '%2F')}%2F{first['feature']}" in page


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "nothing to look for"),
        ({"where": "nonsense > 1"}, "no statistic named nonsense; there are feature, layer"),
        ({"where": "density <"}, "the store does not understand this"),
        ({"q": "return", "kind": "like"}, "names no feature: write ADDRESS/INDEX"),
        ({"q": "nowhere/at/all/3", "kind": "like"}, "not in the stores"),
        ({"q": "return", "in": "nowhere"}, "nowhere is not indexed in any open store"),
        ({"q": "return", "limit": 0}, "greater than or equal to 1"),
        ({"q": "return", "limit": 100_000}, "less than or equal to 200"),
        ({"q": "return", "kind": "magic"}, "kind"),
        ({"q": "x" * 30_000}, "at most 20000"),
        ({"q": "a " * 5_000, "kind": "text"}, "longer than the 512 tokens of one context"),
    ],
)
def test_mistakes_are_sentences(client, asked, sentence):
    answer = client.get("/api/search", params=asked)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_mistakes_stand_where_results_would(client):
    for headers in ({}, {"HX-Request": "true"}):
        page = client.get("/search", params={"where": "nonsense > 1"}, headers=headers)
        assert page.status_code == 422
        assert 'role="alert">no statistic named nonsense' in page.text
    assert "Traceback" not in page.text


@pytest.mark.parametrize(
    "query", ['"', "'", "(((", "\0", "😀", "return AND", "*", "~:^", "\ud83d", "  "]
)
def test_strange_words_find_or_do_not(client, query):
    given = query.encode("utf-8", "replace").decode()
    for kind in ("words", "promotes", "text", "like"):
        answer = client.get("/api/search", params={"q": given, "kind": kind})
        assert answer.status_code in (200, 422), (kind, answer.text)
    # A condition cannot break out of what it is among.
    answer = client.get("/api/search", params={"where": "true) OR (true", "in": "x"})
    assert answer.status_code == 422


def test_what_people_wrote_is_never_markup(own_store, indexed):
    store = Store.open(own_store)
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)> zebra"
    store.add_explanations(
        [Explanation(dictionary=indexed[0], feature=3, text=hostile, method="rule", author="a")]
    )
    page = TestClient(create_app(Workbench([store])), base_url=HOST).get(
        "/search", params={"q": "zebra"}
    )
    assert "&lt;script&gt;alert(1)" in page.text
    assert "<script>alert" not in page.text
    asked = '"><script>alert(1)</script>'
    page = TestClient(create_app(Workbench([store])), base_url=HOST).get(
        "/search", params={"q": asked}
    )
    assert "<script>alert" not in page.text


def test_an_empty_store_says_what_to_do(tmp_path):
    client = TestClient(create_app(Workbench([Store.create(tmp_path / "s")])), base_url=HOST)
    assert "gemscope index adds one" in client.get("/api/search?q=x").json()["detail"]
    assert client.get("/search").status_code == 200
