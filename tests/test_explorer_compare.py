"""Texts compared on a page: the command's numbers, and never a file."""

import csv
import io
import json
import time

import pytest
from starlette.testclient import TestClient

from gemscope import features, hub, relate
from gemscope.explorer import Access, Limits, Workbench, create_app
from gemscope.explorer._compare_sides import PRESETS
from gemscope.features import Store

HOST = "http://127.0.0.1"
TEXTS = ("for i in range(3):\n    print(i)\n---\nreturn self.x\n---\nimport os",
         "The cat sat on the mat.\n\nA dog ran.\n\nNobody knows why.")  # fmt: skip


@pytest.fixture(scope="module")
def client(small_store):
    """A reader of an explorer of `small_store`, who may write."""
    access = Access()
    app = create_app(Workbench([Store.open(small_store)]), access)
    with TestClient(app, base_url=HOST, headers={"X-Gemscope": access.page_token}) as client:
        # Commands load the model too, and two loads at once are none that transformers can do.
        assert client.get("/api/search", params={"q": "x", "kind": "text"}).status_code == 200
        yield client


def compared(client, sae, a, b, **more):
    answer = client.get("/api/compare", params={"sae": sae, "a": a, "b": b, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def files(tmp_path):
    """The two texts as folders of files, for the command."""
    for name, text in zip("ab", TEXTS, strict=True):
        (tmp_path / name).mkdir()
        parts = text.split("\n---\n" if "---" in text else "\n\n")
        lines = [json.dumps({"path": f"{name}[{i}]", "text": p}) for i, p in enumerate(parts)]
        (tmp_path / name / "all.jsonl").write_text("\n".join(lines))
    return [tmp_path / name / "all.jsonl" for name in "ab"]


def test_pasted_texts_are_compared_as_the_command_does(client, command, files, indexed):
    code, out, err = command(
        "compare", indexed[0], "--a", f"a={files[0]}", "--b", f"b={files[1]}", "--tokens", 500,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    made = compared(client, indexed[0], f"a=text:{TEXTS[0]}", f"b=text:{TEXTS[1]}", tokens=500)
    assert made["rows"] == json.loads(out)
    assert (made["a"]["documents"], made["b"]["documents"]) == (3, 3)


def test_indexed_texts_need_no_model(miniature, tmp_path, indexed, monkeypatch):
    entry = hub.obtain(hub.locate(indexed[0]))
    one = features.Subject(
        address=indexed[0], sae=hub.build(entry), digest=hub.digest(entry), nominal_l0=entry.l0
    )
    sources = features.sources_of(["held=miniature", "tests=tests"])
    store = Store.create(tmp_path / "store")
    settings = features.Settings(tokens=4_000, keep_activations=True)
    features.index(miniature, [one], sources, store, settings, model_name="miniature")
    monkeypatch.setattr(Workbench, "model", lambda *_: pytest.fail("the model was loaded"))
    client = TestClient(create_app(Workbench([store])), base_url=HOST)
    made = compared(client, indexed[0], "x=indexed:held", "y=indexed:tests")
    said = relate.compare(store.activations(indexed[0]), indexed[0], "held", "tests")
    assert made["rows"] == relate.comparison_json([said])
    assert (made["a"]["name"], made["b"]["name"]) == ("x", "y")
    assert made["told"] == {side: len(said.more_in(side)) for side in "ab"}
    # They are offered on the page, where there are two.
    page = client.get("/compare").text
    assert 'value="held=indexed:held"' in page
    assert 'value="tests=indexed:tests"' in page


def test_a_preset_against_pasted_text(client, indexed):
    made = compared(client, indexed[0], "miniature=miniature", f"b=text:{TEXTS[1]}", tokens=800)
    # What a short text lacks is left to the other, as the command does.
    assert made["a"]["tokens"] + made["b"]["tokens"] == 1_600
    assert made["rows"][0]["density_a"] >= 0


def test_the_csv_is_the_commands(client, command, files, indexed, tmp_path):
    file = tmp_path / "out.csv"
    code, _, err = command(
        "compare", indexed[0], "--a", f"a={files[0]}", "--b", f"b={files[1]}", "--tokens", 500,
        "--csv", file,
    )  # fmt: skip
    assert code == 0, err
    answer = client.get(
        "/api/compare.csv",
        params={
            "sae": indexed[0],
            "a": f"a=text:{TEXTS[0]}",
            "b": f"b=text:{TEXTS[1]}",
            "tokens": 500,
        },
    )
    assert answer.headers["content-type"].startswith("text/csv")
    assert "attachment" in answer.headers["content-disposition"]
    ours = list(csv.DictReader(io.StringIO(answer.text)))
    theirs = list(csv.DictReader(io.StringIO(file.read_text())))
    keep = [n for n in theirs[0] if n in ours[0] and n != "explanation"]
    assert len(keep) == 17
    assert [[r[n] for n in keep] for r in ours] == [[r[n] for n in keep] for r in theirs]


def test_the_page_says_how_far_it_is_and_then_shows_both_sides(client, indexed):
    asked = {
        "sae": indexed[1],
        "a": "p=text:",
        "b": "m=miniature",
        "a_text": TEXTS[0],
        "tokens": 3_000,
    }
    until = time.monotonic() + 120
    page = client.get("/compare", params=asked).text
    while 'hx-trigger="load delay' in page and time.monotonic() < until:
        assert 'role="status"' in page
        time.sleep(0.3)
        page = client.get("/compare", params=asked, headers={"HX-Request": "true"}).text
    assert "Denser in p" in page
    assert "Denser in m" in page
    assert 'id="volcano"' in page
    assert "/api/compare.csv?" in page
    assert f'href="/feature/{indexed[1]}/' in page


def test_long_texts_are_kept_for_the_address(client, indexed):
    said = client.post("/api/compare/texts", json={"text": TEXTS[0]})
    assert said.status_code == 200, said.text
    kept = compared(client, indexed[0], f"a={said.json()['source']}", f"b=text:{TEXTS[1]}")
    assert kept == compared(client, indexed[0], f"a=text:{TEXTS[0]}", f"b=text:{TEXTS[1]}")
    page = client.get(
        "/compare", params={"sae": indexed[0], "a": f"a={said.json()['source']}", "b": "code=code"}
    )
    assert "return self.x" in page.text
    # Writing needs the token of a page.
    refused = client.post("/api/compare/texts", json={"text": "x"}, headers={"X-Gemscope": ""})
    assert refused.status_code == 403


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ("x=/etc/passwd", "code", "'/etc/passwd' is not offered here"),
        ("/etc/*", "code", "is not offered here"),
        ("x=../README.md", "code", "is not offered here"),
        ("x=dataset:owner/name", "code", "is not offered here"),
        ("x=python:code", "tests", "is not offered here"),
        ("code", "code", "both texts are called code"),
        ("x=indexed:library", "code", "text of the index is compared with text of the index"),
        ("x=indexed:nowhere", "y=indexed:held-out", "no text 'nowhere' in this index"),
        ("x=text:one document", "code", "x is 1 document: documents are what is compared"),
        ("x=text:", "code", "x is 0 documents"),
        ("x=kept:0123", "code", "no longer kept; paste it again"),
        ("", "code", "a is missing"),
    ],
)
def test_mistakes_are_sentences(client, indexed, a, b, sentence):
    asked = {"sae": indexed[0], "a": a, "b": b}
    answer = client.get("/api/compare", params=asked)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]
    page = client.get("/compare", params=asked)
    until = time.monotonic() + 60
    while page.status_code == 200 and "load delay" in page.text and time.monotonic() < until:
        time.sleep(0.2)
        page = client.get("/compare", params=asked)
    assert page.status_code == 422
    assert 'role="alert"' in page.text


def test_a_file_named_like_a_preset_is_not_read(client, indexed, tmp_path, monkeypatch):
    # The command prefers no file either; a page must not even look.
    (tmp_path / "tests").mkdir()
    (tmp_path / "python:tests").write_text("secret")
    (tmp_path / "miniature").write_text("secret")
    monkeypatch.chdir(tmp_path)
    made = compared(client, indexed[0], "tests", "miniature", tokens=400)
    assert made["a"]["documents"] > 1
    assert set(PRESETS) == {"code", "docstrings", "tests", "miniature"}


def test_an_unknown_dictionary_and_too_many_tokens(client, indexed):
    answer = client.get("/api/compare", params={"sae": "no/where", "a": "code", "b": "tests"})
    assert answer.status_code == 422
    assert "not indexed in any open store" in answer.text
    asked = {"sae": indexed[0], "a": "code", "b": "tests", "tokens": 10**7}
    assert client.get("/api/compare", params=asked).status_code == 422


def test_nobody_waits_for_ever(small_store, indexed):
    bench = Workbench([Store.open(small_store)], limits=Limits(seconds=0.01))
    client = TestClient(create_app(bench), base_url=HOST)
    asked = {"sae": indexed[0], "a": "miniature", "b": "tests", "tokens": 20_000}
    answer = client.get("/api/compare", params=asked)
    assert answer.status_code == 504
    assert "ask for less" in answer.json()["detail"]
