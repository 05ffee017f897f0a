"""The steer page: text of `gemscope steer`, streamed, stopped, and restored from its address."""

import html
import json
import re
import time
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from explorer import served
from starlette.testclient import TestClient

from gemscope.explorer import Limits, Workbench, create_app
from gemscope.explorer import _steer as steer_page
from gemscope.explorer._worker import Cancelled
from gemscope.features import Store

HOST = "http://127.0.0.1"
PROMPT = 'def area(width, height):\n    """'
BUNDLED = "miniature/transcoder_all/layer_2_width_192_l0_small_affine/7"


@pytest.fixture(scope="module")
def client(small_store):
    """A reader of an explorer of `small_store`."""
    with TestClient(create_app(Workbench([Store.open(small_store)])), base_url=HOST) as client:
        yield client


@pytest.fixture(scope="module")
def lively(small_store, indexed):
    """A feature of each dictionary that fires, and not on everything."""
    found = []
    for address in indexed:
        table = Store.open(small_store).features(address, ["density", "max"]).to_pylist()
        good = [r for r in table if 0.001 < r["density"] < 0.05]
        found.append(f"{address}/{max(good, key=lambda r: r['max'])['feature']}")
    return found


def streamed(client, **query):
    answer = client.get("/api/steer", params={"prompt": PROMPT, **query})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_that_of_the_command(client, command, small_store, lively, temperature):
    query = {
        "feature": lively, "mode": ["add", "floor"], "strength": ["0.5xmax", "2"],
        "positions": "generated", "seed": 3, "max_new_tokens": 12, "temperature": temperature,
    }  # fmt: skip
    *pieces, last = streamed(client, **query)
    code, out, err = command(
        "steer", PROMPT, "--feature", lively[0], "--feature", lively[1], "--mode", "add",
        "--mode", "floor", "--strength", "0.5xmax", "--strength", "2", "--positions", "generated",
        "--seed", 3, "--max-new-tokens", 12, "--temperature", temperature, "--store", small_store,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    wanted = json.loads(out)
    assert last == {"done": wanted}
    for what in ("baseline", "steered"):
        said = "".join(p["text"] for p in pieces if p["what"] == what)
        # Halves of a character at the end are only in the record.
        assert wanted[what][0].startswith(said)
        assert said
    # As it comes: more than one piece, the unsteered text first.
    kinds = [p["what"] for p in pieces]
    assert kinds == sorted(kinds)
    assert len(pieces) > 4


def test_a_bundled_feature_has_its_shipped_maximum(client, command):
    *_, last = streamed(client, feature=BUNDLED, strength="1xmax", max_new_tokens=4)
    code, out, _ = command("steer", PROMPT, "--feature", BUNDLED, "--strength", "1xmax",
                           "--max-new-tokens", 4, "--json")  # fmt: skip
    assert code == 0
    assert last == {"done": json.loads(out)}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({}, "nothing to steer with"),
        ({"feature": "nonsense"}, "names no feature"),
        ({"feature": "miniature/nothing/3", "strength": "2"}, "neither indexed in an open store"),
        ({"feature": "/etc/passwd/3", "strength": "2"}, "neither indexed in an open store"),
        ({"feature": [BUNDLED] * 21, "strength": "2"}, "21 features were given, and 20"),
        ({"feature": BUNDLED}, "add needs a strength"),
        ({"feature": BUNDLED, "strength": "much"}, "no strength 'much'"),
        ({"feature": BUNDLED, "mode": "ad", "strength": "2"}, "no mode named 'ad'"),
        ({"feature": BUNDLED, "mode": "ablate", "strength": "2"}, "takes no strength"),
        ({"feature": BUNDLED, "strength": ["1", "2"]}, "2 times strength for 1 features"),
        ({"feature": BUNDLED, "strength": "2", "positions": "9:12"}, "9:12"),
        ({"feature": BUNDLED, "strength": "2", "max_new_tokens": 257}, "and 256 are generated"),
        ({"feature": BUNDLED, "strength": "2", "chat": True}, "no chat template"),
        ({"feature": BUNDLED, "strength": "2", "prompt": ""}, "an empty text"),
        ({"feature": BUNDLED, "strength": "2", "prompt": "x" * 20_001}, "20,001 characters"),
        ({"feature": BUNDLED, "strength": "2", "temperature": -1}, "temperature"),
        ({"feature": BUNDLED, "strength": "1e300"}, "overflows"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_said(client, query, said):
    answer = client.get("/api/steer", params={"prompt": "x = 1", **query})
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["detail"]


def test_whoever_leaves_stops_the_model(small_store, lively, monkeypatch):
    ended = []

    def watched(*arguments):
        try:
            steered(*arguments)
            ended.append("finished")
        except BaseException as error:
            ended.append(type(error))
            raise

    steered = steer_page.steered
    monkeypatch.setattr(steer_page, "steered", watched)
    query = {"prompt": PROMPT, "feature": lively[0], "strength": "0.1xmax", "max_new_tokens": 250}
    with served(small_store, limits=Limits(new_tokens=250)) as address:
        with urlopen(f"{address}/api/steer?{urlencode(query)}", timeout=60) as answer:
            assert json.loads(answer.readline())["what"] == "baseline"
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.02)
    assert ended == [Cancelled]


def test_what_goes_wrong_on_the_way_is_the_last_line(client, monkeypatch):
    def slow(_bench, _asked, _stop, put):
        put({"what": "baseline", "text": "a"})
        raise TimeoutError

    monkeypatch.setattr(steer_page, "steered", slow)
    first, last = streamed(client, feature=BUNDLED)
    assert first == {"what": "baseline", "text": "a"}
    assert "took longer" in last["error"]


def test_address_restores_and_runs_nothing(client, lively, monkeypatch):
    from gemscope.lm import LanguageModel

    monkeypatch.setattr(LanguageModel, "generate", None)
    query = {
        "prompt": "<b>x</b>", "feature": [*lively, BUNDLED], "mode": ["add", "ablate", "cap"],
        "strength": ["0.5xmax", "", "3"], "positions": ["all", "last", "2:4"], "seed": 9,
        "max_new_tokens": 33, "temperature": 0.5,
    }  # fmt: skip
    answer = client.get("/steer", params=query)
    assert answer.status_code == 200
    page = html.unescape(answer.text)
    assert "&lt;b&gt;x&lt;/b&gt;</textarea>" in answer.text
    for name, values in (("feature", [*lively, BUNDLED]), ("strength", query["strength"]),
                         ("positions", query["positions"])):  # fmt: skip
        assert re.findall(rf'name="{name}" value="([^"]*)"', page) == values
    assert re.findall(r"<option selected>([^<]+)", page) == query["mode"]
    assert 'name="seed" min="0" max="2147483647" value="9"' in page
    assert 'name="max_new_tokens" min="1" max="256" value="33"' in page
    assert 'name="chat"' not in page  # the miniature has no chat template


def test_row_shows_what_the_store_knows(client, small_store, lively):
    address, _, number = lively[0].rpartition("/")
    row = Store.open(small_store).feature(address, int(number))
    page = client.get("/steer/row", params={"feature": lively[0]}).text
    assert f'data-max="{float(row["max"])}"' in page
    assert f"maximum {row['max']:.3g}" in page
    assert f'href="/feature/{lively[0]}"' in page
    assert "no explanation yet" in page
    assert "output score" not in page  # nobody has measured it here
    assert client.get("/steer/row", params={"feature": "x/9"}).status_code == 422


def test_output_score_is_shown_where_it_is_known(own_store, lively):
    store = Store.open(own_store)
    address, _, number = lively[0].rpartition("/")
    run = store.dictionary(address)["run"]
    store.table("features").update(
        where=f"run = '{run}' AND feature = {number}", values={"output_score": 0.731}
    )
    with TestClient(create_app(Workbench([Store.open(own_store)])), base_url=HOST) as client:
        assert "output score 0.731" in client.get("/steer/row", params={"feature": lively[0]}).text
        query = {"q": number, "address": address}
        assert "output score 0.731" in client.get("/steer/find", params=query).text


def test_finding_features(client, lively, indexed, small_store):
    by_name = client.get("/steer/find", params={"q": lively[0]}).text
    assert lively[0] in html.unescape(by_name)
    by_number = client.get("/steer/find", params={"q": "5", "address": indexed[1]}).text
    assert f"{indexed[1]}/5" in html.unescape(by_number)
    token = Store.open(small_store).feature(indexed[0], int(lively[0].rpartition("/")[2]))
    words = token["tokens"][0]["token"].strip() or "return"
    by_words = client.get("/steer/find", params={"q": words})
    assert by_words.status_code == 200
    assert client.get("/steer/find", params={"q": "zzzqqq"}).text.count("Nothing was found") == 1
    assert client.get("/steer/find", params={"q": " "}).text.strip() == ""
    assert client.get("/steer/find", params={"q": f"{indexed[0]}/999999"}).status_code == 422


def test_dose_curve_is_that_of_the_command(client, command, small_store, lively):
    query = {"feature": lively[0], "strengths": "0.5xmax,2xmax", "max_new_tokens": 6,
             "prompt": ["def ", "import "]}  # fmt: skip
    answer = client.get("/api/dose", params=query)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    code, out, err = command(
        "dose", lively[0], "--strengths", "0.5xmax,2xmax", "--max-new-tokens", 6,
        "--prompt", "def ", "--prompt", "import ", "--store", small_store, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert found.pop("sizes") == [0.5, 2.0]
    assert found == json.loads(out)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"mode": "ablate"}, "no strength to vary"),
        ({"strengths": ",".join(map(str, range(1, 14)))}, "at most 12 strengths"),
        ({"strengths": "1", "max_new_tokens": 300}, "256 new tokens"),
        ({"strengths": ""}, "no strength"),
        ({"strengths": "1,1"}, "given twice"),
    ],
)
def test_dose_curves_refused(client, query, said):
    answer = client.get("/api/dose", params={"feature": BUNDLED, **query})
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
