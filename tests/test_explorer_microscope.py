"""A text under the microscope: numbers of `gemscope look`, and what the store knows."""

import html
import re
import time

import pytest
from starlette.testclient import TestClient

from gemscope import features, hub, miniature
from gemscope.explorer import Limits, Workbench, create_app
from gemscope.features import Store

HOST = "http://127.0.0.1"
TEXT = 'def area(width, height):\n    """显微镜 مجهر 🔬"""\n\treturn width * height\n'
WIDEST = "miniature/resid_post/layer_3_width_2k_l0_medium"
CROSS = "miniature/crosscoder/layer_1_2_3_4_width_384_l0_medium"


@pytest.fixture(scope="module")
def client(small_store):
    """A reader of an explorer of `small_store`."""
    with TestClient(create_app(Workbench([Store.open(small_store)])), base_url=HOST) as client:
        yield client


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A reader of an explorer whose store holds nothing yet."""
    bench = Workbench([Store.create(tmp_path_factory.mktemp("empty") / "store")])
    with TestClient(create_app(bench), base_url=HOST) as client:
        yield client


def looked(client, text=TEXT, **more):
    answer = client.get("/api/look", params={"text": text, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def read(client, text=TEXT, part="reading", **more):
    answer = client.get("/", params={"text": text, **more}, headers={"HX-Target": part})
    assert answer.status_code == 200, answer.text
    return answer.text


def test_numbers_are_those_of_look_to_the_bit(client, miniature, indexed):
    addresses = [*indexed, WIDEST, CROSS]
    found = looked(client, sae=addresses, top=50, max_density=1)
    for part, address in zip(found["dictionaries"], addresses, strict=True):
        seen = features.look(miniature, hub.load_sae(address), TEXT)
        wanted = seen.json(50)
        assert found["tokens"] == wanted["tokens"]
        assert found["counted"] == seen.counted
        assert part["l0"] == seen.l0
        kept = [
            [{k: f[k] for k in ("feature", "value", "layer") if k in f} for f in row]
            for row in part["features"]
        ]
        assert kept == wanted["features"]


def test_pieces_are_the_text(client):
    found = looked(client)
    assert "".join(p for p, c in zip(found["pieces"], found["counted"], strict=True) if c) == TEXT


def test_what_the_store_knows_of_features(client, small_store, indexed):
    found = looked(client, sae=indexed[0], top=3, max_density=1)
    store = Store.open(small_store)
    for one in found["dictionaries"][0]["features"][3]:
        row = store.feature(indexed[0], one["feature"])
        assert one["density"] == row["density"]
        assert one["max"] == pytest.approx(row["max"])


def test_a_note_is_the_explanation(own_store, indexed):
    store = Store.open(own_store)
    with TestClient(create_app(Workbench([store])), base_url=HOST) as client:
        first = looked(client, sae=indexed[0], max_density=1)["dictionaries"][0]["features"][3][0]
        text = '<script>alert(1)</script> and "quotes"'
        store.add_notes([features.Note(dictionary=indexed[0], feature=first["feature"], text=text)])
        again = looked(client, sae=indexed[0], max_density=1)["dictionaries"][0]["features"][3][0]
        assert again == first | {"explanation": text, "score": again["score"]}
        page = read(client, sae=indexed[0], dense=1, token=3)
        assert "<script>alert" not in page
        assert html.escape(text, quote=False).split(" and ")[0] in page


def test_dense_features_are_hidden(client, small_store, indexed):
    density = Store.open(small_store).features(indexed[0], ["density"])["density"].to_pylist()
    shown = looked(client, sae=indexed[0], top=50, max_density=0.02)["dictionaries"][0]
    every = looked(client, sae=indexed[0], top=50, max_density=1)["dictionaries"][0]
    for few, many in zip(shown["features"], every["features"], strict=True):
        assert few == [f for f in many if density[f["feature"]] <= 0.02]
    assert shown["l0"] == every["l0"]


def test_default_is_the_widest_indexed_or_bundled(client, bare, indexed):
    assert looked(client)["dictionaries"][0]["address"] == max(indexed)
    (only,) = looked(bare)["dictionaries"]
    assert only["address"] == WIDEST
    one = next(f for row in only["features"] for f in row)
    assert (one["density"], one["max"], one["explanation"], one["score"]) == (None,) * 4
    assert "without explanations" in bare.get("/").text


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"text": ""}, "an empty text"),
        ({"text": "<eos>"}, "only special tokens"),
        ({"text": "a " * 10_001}, "the text has 20,002 characters, and 20,000 are read at once"),
        ({"text": "a b c " * 400}, "longer than the 512 tokens"),
        ({"text": "x", "sae": "miniature/nothing"}, "neither indexed in an open store nor"),
        ({"text": "x", "sae": "/etc"}, "neither indexed in an open store nor"),
        ({"text": "x", "sae": [f"a/{i}" for i in range(9)]}, "9 dictionaries were chosen, and 8"),
    ],
)
def test_refusals(client, query, said):
    answer = client.get("/api/look", params=query)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    for headers in ({}, {"HX-Target": "reading"}):
        page = client.get("/", params=query, headers=headers)
        assert page.status_code == 422
        assert '<p class="mistake" role="alert">' in page.text
        assert said in html.unescape(page.text)
        # In place: the form is still there with what was typed.
        assert ("<textarea" in page.text) is not bool(headers)


@pytest.mark.parametrize(
    "query",
    [
        {"feature": "nonsense"}, {"feature": f"{WIDEST}/2048"}, {"sort": "size"}, {"dense": 0},
        {"dense": "nan"}, {"top": 0}, {"token": "x"}, {"top": 51},
    ],
)  # fmt: skip
def test_bad_states(client, query):
    assert client.get("/", params={"text": "x = 1", **query}).status_code == 422


def test_token_limit(small_store):
    bench = Workbench([Store.open(small_store)], limits=Limits(tokens=5))
    with TestClient(create_app(bench), base_url=HOST) as client:
        answer = client.get("/api/look", params={"text": "one two three four five six"})
        assert answer.status_code == 422
        assert "tokens, and 5 are read" in answer.json()["detail"]


def rows(page):
    """Numbers of the features in the first table of features."""
    table = page.split("<tbody>")[-1]
    return [int(n) for n in re.findall(r'<td class="mono"><span.*?/(\d+)">\d+</a>', table)]


def test_sorting(client, indexed):
    address = indexed[1]
    every = looked(client, sae=address, top=50, max_density=1)["dictionaries"][0]["features"]
    totals = {}
    for row in every:
        for one in row:
            totals[one["feature"]] = totals.get(one["feature"], 0.0) + one["value"]
    at = every[4]
    assert len(at) > 8
    keys = {
        "strength": lambda f: -f["value"],
        "density": lambda f: (f["density"], -f["value"]),
        "frequency": lambda f: -totals[f["feature"]],
    }
    for sort, key in keys.items():
        page = read(client, sae=address, token=4, sort=sort, dense=1, top=8)
        assert rows(page) == [f["feature"] for f in sorted(at, key=key)][:8]


def test_colour_is_of_the_chosen_feature(client, small_store, indexed):
    address = indexed[0]
    every = looked(client, sae=address, top=50, max_density=1)["dictionaries"][0]["features"]
    number = every[4][0]["feature"]
    most = Store.open(small_store).feature(address, number)["max"]
    # The colour's dictionary need not be among those that are listed.
    for sae in indexed:
        page = read(client, sae=sae, feature=f"{address}/{number}")
        shades = re.findall(
            r"<label class=\"tok\" style=\"background: rgba\(var\(--fire\), ([\d.]+)", page
        )
        wanted = [
            next((f["value"] for f in row if f["feature"] == number), 0.0) for row in every[1:]
        ]
        assert shades == [f"{features.shade(v, most):.2f}" for v in wanted]
        assert f"/feature/{address}/{number}" in page


def test_layers_side_by_side(client, indexed):
    saes = {part["address"]: part for part in looked(client, sae=indexed)["dictionaries"]}
    page = read(client, "x = [1, 2]\n", part="panel", sae=[*indexed, CROSS], token=2, dense=1)
    ladder = re.findall(r'<th scope="row" class="mono" title="([^"]+)">([^<]+)</th>', page)
    assert [site for _, site in ladder] == [
        f"{layer}.resid_post" for layer in (1, 2, 2, 3, 3, 4)
    ]  # fmt: skip
    assert {a for a, _ in ladder} == {*saes, CROSS}
    assert "<textarea" not in page
    assert 'id="tokens"' not in page
    alone = read(client, part="panel", sae=indexed[0], token=2)
    assert "Layer by layer" not in alone


def test_whole_page_without_scripts(client, indexed):
    page = client.get("/", params={"text": TEXT, "sae": indexed, "token": 3}).text
    assert page.count("checked") == 3  # two dictionaries and the token
    assert 'id="t3" value="3" checked' in page
    assert html.escape(TEXT.splitlines()[0]) in page.replace("&#34;", '"')
    assert "<script>" not in page
    assert not re.search(r"\son\w+=", page)
    # Asked for by htmx when going back, it is the whole page again.
    again = client.get(
        "/", params={"text": TEXT},
        headers={"HX-Target": "reading", "HX-History-Restore-Request": "true"},
    )  # fmt: skip
    assert "<html" in again.text


def test_first_page_does_not_wait_for_the_model(client):
    page = client.get("/").text
    assert 'hx-trigger="load"' in page
    assert "Reading the text" in page


def test_in_chinese(client):
    page = client.get("/", params={"text": TEXT, "lang": "zh", "token": 3}).text
    assert "显微镜" in page
    assert "逐词典" not in page  # one dictionary only
    assert "个特征激活" in page


def test_pass_is_kept(client, monkeypatch, indexed):
    text = "kept = True\n"
    looked(client, text, sae=indexed)
    from gemscope.lm import LanguageModel

    monkeypatch.setattr(LanguageModel, "run", None)
    looked(client, text, sae=indexed, top=9, max_density=0.5)
    read(client, text, sae=indexed, token=2)


def test_200_tokens_under_300_ms(client, indexed):
    lines = miniature.MODEL.parent.joinpath("text").glob("*.jsonl")
    source = next(lines).read_text("utf-8")[2000:2600].encode("ascii", "ignore").decode()
    assert len(looked(client, "x" + source)["tokens"]) > 200
    took = []
    for n in range(3):
        began = time.perf_counter()
        looked(client, f"{n}{source}")
        took.append(time.perf_counter() - began)
    assert min(took) < 0.3
