"""Maps of dictionaries: what `gemscope cluster` says, made once, kept beside the store."""

import json
import re
import time

import pytest
from starlette.testclient import TestClient

from gemscope.explorer import Workbench, create_app
from gemscope.explorer._map_tree import tree_of
from gemscope.features import Store

HOST = "http://127.0.0.1"


@pytest.fixture(scope="module")
def store(small_store, tmp_path_factory):
    """A copy of `small_store` that maps may be kept in."""
    import shutil

    return shutil.copytree(small_store, tmp_path_factory.mktemp("map") / "store")


@pytest.fixture
def client(store):
    """A reader of an explorer of `store`."""
    with TestClient(create_app(Workbench([Store.open(store)])), base_url=HOST) as client:
        yield client


def ready(client, url, seconds=120):
    """The answer, when the map has been made."""
    until = time.monotonic() + seconds
    while (answer := client.get(url)).status_code == 202 and time.monotonic() < until:
        assert answer.json()["state"] in ("making", "waiting")
        time.sleep(0.3)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def record(store, indexed):
    """The map of a dictionary, from the server."""
    with TestClient(create_app(Workbench([Store.open(store)])), base_url=HOST) as client:
        return ready(client, f"/api/map/{indexed[0]}?tree=true")


def test_it_is_what_the_command_says(record, command, store, indexed):
    code, out, err = command("cluster", store, indexed[0], "--json", "--map")
    assert code == 0, err
    said = json.loads(out)
    figures = Store.open(store).figures()[indexed[0]]
    for one in record["map"]:
        assert [one.pop("density"), one.pop("max")] == figures[one["feature"]].tolist()
        assert one.pop("explanation") is None
    assert record == said


@pytest.mark.slow
def test_it_is_made_once_and_kept(client, record, store, indexed):
    run = Store.open(store).dictionary(indexed[0])["run"]
    file = store / "maps" / f"{run}-together.json"
    assert json.loads(file.read_bytes())["dictionary"] == indexed[0]
    # Another server reads it; what is damaged is made again.
    answer = client.get(f"/api/map/{indexed[0]}")
    assert answer.status_code == 200
    assert "tree" not in answer.json()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with TestClient(create_app(Workbench([Store.open(store)])), base_url=HOST) as other:
        assert other.get(f"/api/map/{indexed[0]}").status_code == 202
        ready(other, f"/api/map/{indexed[0]}")
    assert json.loads(file.read_bytes()) == json.loads(whole)


def test_the_page_of_a_feature_shows_its_cluster(client, record, indexed):
    one = next(c for c in record["clusters"] if c["size"] > 2)
    feature, others = one["members"][0], one["members"][1:7]
    found = client.get(f"/api/feature/{indexed[0]}/{feature}").json()["clusters"][0]
    assert {k: found[k] for k in ("on", "id", "name", "size", "cohesion")} == {
        "on": "together", **{k: one[k] for k in ("id", "name", "size", "cohesion")}
    }  # fmt: skip
    assert [m["feature"] for m in found["members"]] == others
    page = client.get(f"/feature/{indexed[0]}/{feature}").text
    assert f'href="/map/{indexed[0]}?on=together&amp;cluster={one["id"]}"' in page
    assert f'href="/feature/{indexed[0]}/{others[0]}"' in page
    alone = next(c["members"][0] for c in record["clusters"] if c["size"] == 1)
    assert client.get(f"/api/feature/{indexed[0]}/{alone}").json()["clusters"] == []


def test_a_damaged_map_is_no_cluster(own_store, indexed):
    run = Store.open(own_store).dictionary(indexed[0])["run"]
    with TestClient(create_app(Workbench([Store.open(own_store)])), base_url=HOST) as client:
        for kept in ("", "{", "[]", json.dumps({"dictionary": indexed[0], "map": []})):
            (own_store / "maps").mkdir(exist_ok=True)
            (own_store / "maps" / f"{run}-together.json").write_text(kept)
            answer = client.get(f"/api/feature/{indexed[0]}/3")
            assert answer.status_code == 200
            assert answer.json()["clusters"] == []


def test_the_page_waits_and_then_shows_the_map(client, record, indexed):
    url = f"/map/{indexed[1]}?on=directions"
    first = client.get(url)
    assert first.status_code == 200
    assert 'hx-trigger="load delay' in first.text
    assert 'http-equiv="refresh"' in first.text
    ready(client, f"/api/map/{indexed[1]}?on=directions")
    part = client.get(url, headers={"HX-Request": "true"}).text
    assert "<html" not in part
    assert "<canvas" in part
    assert f'data-url="/api/map/{indexed[1]}?on=directions"' in part


def test_every_feature_is_in_the_tree_once(client, record, indexed):
    tree = tree_of(record)
    clusters = [c["id"] for g in tree.groups for c in g.clusters]
    alone = [f for g in tree.groups for f in g.alone]
    members = [f for c in clusters for f in record["clusters"][c]["members"]]
    assert sorted(members + alone) == sorted(record["leaves"])
    assert tree.root.size == record["features"] == sum(c["size"] for c in record["clusters"])
    assert sorted(tree.root.all_clusters) == [c["id"] for c in record["clusters"]]
    for group in tree.groups:
        below = sum(g.size for g in group.groups) + len(group.alone)
        assert group.size == below + sum(c["size"] for c in group.clusters)
    # Asked for one by one they have links to every feature that is shown.
    number = tree.root.groups[0].number
    part = client.get(f"/map/{indexed[0]}?group={number}", headers={"HX-Request": "true"}).text
    shown = {int(f) for f in re.findall(rf'href="/feature/{indexed[0]}/(\d+)"', part)}
    wanted = {f for c in tree.groups[number].clusters for f in c["members"][:6]}
    assert shown == wanted | set(tree.groups[number].alone)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nowhere/at/all", "nowhere/at/all is not indexed in any open store"),
        ("../../etc/passwd", "is not indexed|Not Found"),
        ("{0}?on=magic", "together"),
        ("{0}?group=100000", "no group 100000: this tree has 0 to"),
    ],
)
def test_mistakes_are_sentences(client, record, indexed, url, sentence):
    answer = client.get("/map/" + url.format(indexed[0]))
    assert answer.status_code in (404, 422)
    assert re.search(sentence, answer.text)
    assert "Traceback" not in answer.text


def test_without_activations_there_is_none(client, store, indexed):
    kept = store / "activations"
    kept.rename(store / "elsewhere")
    try:
        answer = client.get(f"/api/map/{indexed[0]}")
        page = client.get("/map")
    finally:
        (store / "elsewhere").rename(kept)
    assert answer.status_code == 422
    assert "--keep-activations keeps them" in answer.json()["detail"]
    assert page.text.count("activations not kept") == 2
    assert f'href="/map/{indexed[0]}"' in client.get("/map").text


@pytest.mark.slow
def test_a_store_that_cannot_be_written_has_maps_all_the_same(own_store, indexed):
    (own_store / "maps").write_text("in the way")
    with TestClient(create_app(Workbench([Store.open(own_store)])), base_url=HOST) as client:
        assert ready(client, f"/api/map/{indexed[0]}")["features"] > 100
        assert client.get(f"/api/map/{indexed[0]}").status_code == 200


def test_what_is_being_made_ends_with_the_server(own_store, indexed):
    app = create_app(Workbench([Store.open(own_store)]))
    began = time.monotonic()
    with TestClient(app, base_url=HOST) as client:
        assert client.get(f"/api/map/{indexed[0]}").status_code == 202
        time.sleep(0.5)
    assert time.monotonic() - began < 3
    time.sleep(1)
    assert not list(own_store.glob("maps/*.json"))
