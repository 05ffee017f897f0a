"""The page of a feature: its record, notes, the text box, and hostile text in all of it."""

import json
import time
from html.parser import HTMLParser
from math import isclose

import pytest
from fastapi.testclient import TestClient

from gemscope import features
from gemscope.explorer import Access, Workbench, create_app
from gemscope.features import Explanation, Store

HOSTILE = (
    "<script>window.xss=1</script>",
    "<img src=x onerror=window.xss=1>",
    '"><svg onload=window.xss=1>',
    "' onmouseover='window.xss=1",
    "</textarea></title></style><script>window.xss=1</script>",
    "javascript:window.xss=1",
    "{{ 7*7 }}{% raw %}",
    "&lt;script&gt;&#x3c;b>",
    "<!--",
    "]]><a href='//evil.example'>x</a>",
    "⏎\n\t\r\x00\u202eabc\u2066",
    "سلام 你好 😀",
)


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def check_harmless(page):
    """No tag, handler or address in `page` comes from text."""
    for tag, attributes in Tags(page).found:
        assert tag not in ("img", "iframe", "object", "embed", "base"), (tag, attributes)
        assert tag != "script" or attributes["src"].startswith(("/static/", "site.js")), attributes
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name, value)
            if name in ("href", "src", "action"):
                assert not (value or "").strip().lower().startswith(("javascript:", "//", "http"))


def poisoned(record, text):
    """The record with `text` wherever a text or a token stands."""
    record = json.loads(json.dumps(record))
    for name in ("tokens", "before", "after", "promoted", "suppressed"):
        for token in record[name]:
            token["token"] = text
    for name in ("together", "neighbours"):
        for other in record[name]:
            other["explanation"] = text
    for context in record["contexts"]:
        context["tokens"] = [text] * len(context["tokens"])
        context |= {"document": text, "source": text}
    for explanation in record["explanations"]:
        explanation |= {"text": text, "author": text}
    for source in record["dictionary"]["sources"]:
        source["name"] = text
    return record


@pytest.fixture(scope="module")
def client(small_store):
    with TestClient(create_app(Workbench([Store.open(small_store)]), Access(hosts=()))) as made:
        yield made


@pytest.fixture
def writer(own_store):
    access = Access(hosts=())
    with TestClient(create_app(Workbench([Store.open(own_store)]), access)) as made:
        made.headers["X-Gemscope"] = access.page_token
        yield made


@pytest.fixture(scope="module")
def where(indexed, small_store):
    """A feature that fires a lot but not everywhere."""
    table = Store.open(small_store).features(indexed[0], ["count"])
    order = table["count"].to_numpy().argsort()
    return indexed[0], int(order[len(order) * 3 // 4])


def test_the_record_is_that_of_the_command_line(client, small_store, where):
    address, feature = where
    got = client.get(f"/api/feature/{address}/{feature}").json()
    want = json.loads(json.dumps(features.card(Store.open(small_store), address, feature)))
    for name in want:
        if name == "together":
            # The page adds to these.
            pairs = zip(want[name], got[name], strict=True)
            assert all(one.items() <= other.items() for one, other in pairs)
        else:
            assert got[name] == want[name], name


def test_shares_of_firing_together(client, small_store, where):
    address, feature = where
    got = client.get(f"/api/feature/{address}/{feature}").json()
    activations = Store.open(small_store).activations(address)
    own = set(activations.of(address, feature)[0].tolist())
    assert got["together"]
    for other in got["together"][:4]:
        theirs = set(activations.of(address, other["feature"])[0].tolist())
        assert other["fired"] == len(theirs)
        for name, size in (("other_given_this", own), ("this_given_other", theirs)):
            share = other[name]
            assert isclose(share["value"], len(own & theirs) / len(size))
            assert share["low"] <= share["value"] <= share["high"]


def test_relations_are_those_of_the_command(small_store, indexed):
    from gemscope.explorer._feature_record import record
    from gemscope.explorer._feature_store import KeptStore
    from gemscope.relate import from_store, relations

    store = Store.open(small_store)
    known = {(r.feature, r.other): r.kind for r in relations(from_store(store, indexed[0]))}
    kept, seen = KeptStore(store), 0
    # A pair's own kinds: `parent` says that this is the parent of the other.
    for (feature, _), kind in list(known.items())[:12]:
        if kind not in ("parent", "child", "duplicate"):
            continue
        for other in record(kept, indexed[0], feature)["together"]:
            want = known.get((feature, other["feature"]))
            if other["relation"] or want in ("parent", "child", "duplicate"):
                assert other["relation"] == want
                seen += 1
    assert seen or not any(k in ("parent", "child", "duplicate") for k in known.values())


@pytest.mark.parametrize("view", ["stacked", "snippet", "full"])
@pytest.mark.parametrize("breaks", ["0", "1"])
def test_the_page_in_every_view(client, where, view, breaks):
    address, feature = where
    answer = client.get(f"/feature/{address}/{feature}?view={view}&breaks={breaks}")
    assert answer.status_code == 200
    for said in ("Top activations", "threshold", "Near misses", "Steer with this", "P(j|i)"):
        assert said in answer.text
    assert f"/steer?feature={address.replace('/', '%2F')}%2F{feature}" in answer.text
    check_harmless(answer.text)


def test_chinese_is_whole(client, where):
    page = client.get("/feature/{}/{}?lang=zh".format(*where)).text
    client.cookies.clear()
    for english in ("Top activations", "Near misses", "Not explained", "Try it", "Steer with"):
        assert english not in page


@pytest.mark.parametrize(
    "path",
    ["{a}/999999", "{a}/99999999999999999999999", "nothing/here/1", "{a}/3?view=sideways",
     "{a}/go?index=-1", "{a}/go?index=9999999", "{a}/x", "{a}/3/live?text=" + "x" * 30000],
)  # fmt: skip
def test_mistakes_are_told(client, indexed, path):
    for begin in ("/feature/", "/api/feature/"):
        answer = client.get(begin + path.format(a=indexed[0]), follow_redirects=False)
        # The twin has no view, and random and go are of the page alone.
        if begin == "/api/feature/" and "view=" in path:
            continue
        assert 400 <= answer.status_code < 500, (begin, path, answer.status_code)


def test_going_elsewhere(client, indexed):
    address = indexed[0]
    to = client.get(f"/feature/{address}/go?index=7", follow_redirects=False)
    assert to.headers["location"] == f"/feature/{address}/7"
    to = client.get(f"/feature/{address}/random", follow_redirects=False).headers["location"]
    assert int(to.rpartition("/")[2]) < 384


def test_the_text_box_gives_what_the_dictionary_encodes(client, miniature, where):
    from gemscope.hub import load_sae

    address, feature = where
    known = client.get(f"/api/feature/{address}/{feature}").json()
    text = "".join(known["contexts"][0]["tokens"][1:])
    got = client.get(f"/api/feature/{address}/{feature}/live", params={"text": text}).json()
    sae = load_sae(address)
    run = miniature.run(text, read=[sae.reads])
    code = sae.encode(run[sae.reads][0][1:].float())
    want = [0.0] * len(got["tokens"])
    for row, index, value in zip(
        code.rows.tolist(), code.indices.tolist(), code.values.tolist(), strict=True
    ):
        if index == feature:
            want[row] = value
    assert got["values"] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert max(want) > 0
    assert "".join(got["tokens"]) == text
    page = client.get(f"/feature/{address}/{feature}", params={"text": text}).text
    part = client.get(f"/feature/{address}/{feature}/live", params={"text": text})
    assert part.headers["hx-replace-url"].startswith(f"/feature/{address}/{feature}?text=")
    for told in (page, part.text):
        assert f" of {len(want)} tokens" in told


def test_a_text_that_is_too_long_is_told_beside_the_box(client, indexed):
    answer = client.get(f"/feature/{indexed[0]}/1", params={"text": "many words " * 1500})
    assert answer.status_code == 200
    assert '<p class="mistake" role="alert">' in answer.text


def test_notes_are_kept(writer, own_store, where):
    address, feature = where
    body = {
        "feature": f"{address}/{feature}",
        "text": " it counts ",
        "author": "Ada",
        "confidence": 0.7,
    }
    made = writer.post("/api/notes", json=body)
    assert made.status_code == 201
    page = writer.get(f"/feature/{address}/{feature}").text
    assert page.index("it counts") < page.index("density")
    again = body | {"text": "it counts things", "replaces": made.json()["key"]}
    assert writer.post("/api/notes", json=again).status_code == 201
    # After a restart of the server.
    access = Access(hosts=())
    with TestClient(create_app(Workbench([Store.open(own_store)]), access)) as client:
        notes = client.get("/api/notes", params={"feature": body["feature"]}).json()
        assert [(n["text"], n["replaced"]) for n in notes] == [
            ("it counts things", False), ("it counts", True),
        ]  # fmt: skip
        assert (notes[0]["author"], notes[0]["confidence"]) == ("Ada", 0.7)
    assert [n.text for n in Store.open(own_store).notes(address, feature)].count("it counts") == 1


@pytest.mark.parametrize(
    "wrong",
    [{"text": ""}, {"text": "   "}, {"confidence": 2}, {"feature": "x"}, {"feature": "no/such/1"},
     {"author": "x" * 300}, {"text": 5}],
)  # fmt: skip
def test_wrong_notes_are_refused(writer, where, wrong):
    body = {"feature": "{}/{}".format(*where), "text": "a"} | wrong
    assert writer.post("/api/notes", json=body).status_code == 422


def test_notes_need_the_token_of_a_page(client, where):
    body = {"feature": "{}/{}".format(*where), "text": "a"}
    assert client.post("/api/notes", json=body).status_code == 403


def test_notes_go_before_explanations_of_others(writer, where):
    """A page that was made before keeps nothing old: the note stands beside neighbours too."""
    address, feature = where
    near = writer.get(f"/api/feature/{address}/{feature}").json()["neighbours"][0]["feature"]
    writer.post("/api/notes", json={"feature": f"{address}/{near}", "text": "a neighbour"})
    found = writer.get(f"/api/feature/{address}/{feature}").json()["neighbours"][0]
    assert found["explanation"] == "a neighbour"


def test_hostile_notes_and_explanations(writer, own_store, where):
    address, feature = where
    rows = [
        Explanation(dictionary=address, feature=feature, text=t, method="model", author=t)
        for t in HOSTILE
    ]
    Store.open(own_store).add_explanations(rows)
    for text in HOSTILE:
        body = {"feature": f"{address}/{feature}", "text": text, "author": text}
        assert writer.post("/api/notes", json=body).status_code in (201, 422)
    for part in ("", "/notes", "/layers", "/card.html"):
        page = writer.get(f"/feature/{address}/{feature}{part}").text
        check_harmless(page)
    assert "window.xss=1&lt;/script&gt;" in writer.get(f"/feature/{address}/{feature}").text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_tokens(client, where, text, monkeypatch):
    from gemscope.explorer import _feature

    monkeypatch.setattr(_feature, "record", lambda *given: poisoned(_record(*given), text))
    from gemscope.explorer._feature_record import record as _record

    for view in ("stacked", "snippet"):
        address = "/feature/{}/{}".format(*where)
        answer = client.get(address, params={"view": view, "text": text, "breaks": "1"})
        assert answer.status_code == 200
        check_harmless(answer.text)


def test_files_to_keep(client, where):
    address, feature = where
    page = client.get(f"/feature/{address}/{feature}/card.html")
    assert "attachment" in page.headers["content-disposition"]
    assert "Where the numbers come from" in page.text
    assert "<script" not in page.text
    record = client.get(f"/feature/{address}/{feature}/card.json")
    assert record.json() == client.get(f"/api/feature/{address}/{feature}").json()


def test_layers(client, indexed, small_store):
    found = client.get(f"/api/feature/{indexed[0]}/5/layers").json()
    assert found["previous"] is None
    assert found["next"]["address"] == indexed[1]
    among = features.Among(addresses=(indexed[1],), limit=5)
    want = features.search_like(Store.open(small_store), indexed[0], 5, among)
    assert [n["feature"] for n in found["next"]["found"]] == [f.feature for f in want]
    assert [n["cosine"] for n in found["next"]["found"]] == pytest.approx(
        [f.score for f in want], abs=1e-5
    )
    assert "Next layer" in client.get(f"/feature/{indexed[0]}/5/layers").text


def test_dead_and_dense_features_say_so(client, small_store, indexed):
    counts = Store.open(small_store).features(indexed[0], ["count", "density"])
    dense = [r["feature"] for r in counts.to_pylist() if r["density"] > 0.1]
    dead = [r["feature"] for r in counts.to_pylist() if not r["count"]]
    for numbers, tag, said in ((dense, "dense", "more than 10%"), (dead, "dead", "never fired on")):
        for feature in numbers[:1]:
            assert client.get(f"/api/feature/{indexed[0]}/{feature}").json()["tags"] == [tag]
            assert said in client.get(f"/feature/{indexed[0]}/{feature}").text


def test_a_dead_feature_has_an_honest_page(client, where, monkeypatch):
    from gemscope.explorer import _feature
    from gemscope.explorer._feature_record import record, tags

    def dead(*given):
        empty = {n: [] for n in ("tokens", "before", "after", "together", "contexts", "quantiles")}
        found = record(*given) | empty | {"count": 0, "density": 0.0, "max": 0.0, "documents": 0}
        return found | {
            "histogram": {"first": 0, "counts": []}, "positions": [0] * 8, "tags": tags(0, 0.0),
        }  # fmt: skip

    monkeypatch.setattr(_feature, "record", dead)
    page = client.get("/feature/{}/{}".format(*where)).text
    assert "never fired on" in page
    assert "Top activations" not in page
    assert ">dead<" in page


def test_numbers_that_are_none_are_null(client, where, monkeypatch):
    from gemscope.explorer import _feature
    from gemscope.explorer._feature_record import record

    odd = {"logit_skew": float("nan"), "output_score": float("inf"), "encoder_decoder_cosine": None}
    monkeypatch.setattr(_feature, "record", lambda *given: record(*given) | odd)
    got = client.get("/api/feature/{}/{}".format(*where)).json()
    assert got["logit_skew"] is None
    assert got["output_score"] is None
    assert client.get("/feature/{}/{}".format(*where)).status_code == 200


def test_what_is_kept_is_what_the_store_says(small_store, indexed):
    from gemscope.explorer._feature_store import KeptStore

    store = Store.open(small_store)
    kept = KeptStore(store)
    keys = [(a, i) for a in indexed for i in (0, 1, 17, 100)]
    assert kept.described(keys) == features.described(store, keys)
    for address, i in keys:
        assert kept.feature(address, i) == store.feature(address, i)
        assert kept.explanations(address, i) == store.explanations(address, i)
        assert kept.contexts(address, i) == store.contexts(address, i)
        ids = store.text(address).ids[:300].tolist()
        assert kept.pieces(address)(ids) == kept.pieces(address)(ids) == store.pieces(address)(ids)
    assert kept.directions(indexed[1]) == pytest.approx(store.directions(indexed[1]))


def test_split_characters_are_remembered_as_they_are(miniature):
    known = features.KnownPieces(miniature.tokenizer)
    for text in ("def f(x):", "字 😀 字", "x = '\u202e'", "字"):
        ids = miniature.tokenizer(text)["input_ids"]
        for given in (ids, ids[::-1], [*ids, 10**6, *ids]):
            want = features.token_pieces(miniature.tokenizer, given)
            assert known(given) == known(given) == want


def test_what_another_process_writes_is_seen_a_moment_later(own_store, indexed):
    from gemscope.explorer._feature_record import record
    from gemscope.explorer._feature_store import KeptStore

    kept, other = KeptStore(Store.open(own_store)), Store.open(own_store)
    assert record(kept, indexed[0], 3)["notes"] == []
    note = features.Note(dictionary=indexed[0], feature=3, text="of somebody else")
    other.add_notes([note])
    said = Explanation(dictionary=indexed[0], feature=4, text="a rule", method="rule", author="-")
    other.add_explanations([said])
    until = time.monotonic() + 10
    while not record(kept, indexed[0], 3)["notes"] and time.monotonic() < until:
        time.sleep(0.1)
    assert [n["text"] for n in record(kept, indexed[0], 3)["notes"]] == ["of somebody else"]
    assert [e["text"] for e in record(kept, indexed[0], 4)["explanations"]] == ["a rule"]
    # What is written through the server's own store is there at once.
    kept.add_notes([features.Note(dictionary=indexed[0], feature=3, text="mine")])
    assert len(record(kept, indexed[0], 3)["notes"]) == 2


def test_the_threshold_is_drawn_where_it_is():
    from gemscope.explorer._feature_draw import WIDTH, activation_bars

    record = {"threshold": 1.0, "histogram": {"first": 4, "counts": [1, 2, 3, 4]}}
    made = activation_bars(record)
    # The axis goes down to the threshold: 8 bins from 2 ** 0 to 2 ** 2.
    assert made.line == (0.0, 1.0)
    assert made.extra == {"begin": 0, "total": 8}
    assert made.bars[0]["x"] == WIDTH / 2
    inside = activation_bars(record | {"threshold": 2**1.5})
    assert inside.line[0] == pytest.approx(WIDTH / 2)
    assert activation_bars(record | {"threshold": 0.0}).line is None
    assert activation_bars(record | {"histogram": {"first": 0, "counts": []}}) is None


def test_the_summary_of_a_feature_for_other_pages():
    from gemscope.explorer._render import environment, translator

    made = environment().get_template("feature_summary.html")
    for text in HOSTILE:
        f = {
            "address": "a/b",
            "feature": 3,
            "explanation": text,
            "promoted": [{"token": text}],
            "density": 0.2,
        }
        page = made.render(t=translator("en"), f=f)
        check_harmless(page)
        assert 'href="/feature/a/b/3"' in page
        assert "dense" in page
    assert "Not explained yet" in made.render(
        t=translator("en"), f={"address": "a/b", "feature": 3}
    )
