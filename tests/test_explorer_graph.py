"""Graphs in the explorer: what is listed and shown, changed, traced, compared and refused."""

import json
import shutil
from dataclasses import replace
from urllib.parse import quote

import pytest
import torch
from circuits_graphs import closes, graph_of, random_graph
from fastapi.testclient import TestClient
from test_explorer_pages import HOSTILE, Reader, check_page

from gemscope.circuits import Group, Kind, Node, import_graph, load_graph, save_graph, trace
from gemscope.errors import InputError
from gemscope.explorer import Access, Workbench, create_app, open_workbench
from gemscope.features import Store

PROMPT = "def area(width, height):\n    return width *"
SET = "miniature/transcoder_all"


@pytest.fixture(scope="module")
def area(miniature):
    """A graph of the miniature."""
    return trace(PROMPT, [SET], model=miniature)


@pytest.fixture(scope="module")
def folder(small_store, area, tmp_path_factory):
    """A store that keeps a traced graph, a random one and an attack."""
    place = tmp_path_factory.mktemp("graphs") / "store"
    shutil.copytree(small_store, place)
    (place / "graphs").mkdir()
    save_graph(area, place / "graphs" / "area.safetensors")
    save_graph(random_graph(3), place / "graphs" / "random.safetensors")
    save_graph(hostile_graph(), place / "graphs" / "hostile.safetensors")
    (place / "graphs" / "broken.safetensors").write_bytes(b"nothing")
    return place


def hostile_graph():
    """Every text of it attacks."""
    graph = random_graph(5)
    ids = [node.id for node in graph.nodes]
    many = [HOSTILE[n % len(HOSTILE)] for n in range(len(ids))]
    return replace(
        graph, prompt="".join(HOSTILE), labels=dict(zip(ids, many, strict=True)),
        tokens=tuple(HOSTILE[n % len(HOSTILE)] for n in range(len(graph.tokens))),
        groups=(Group(HOSTILE[0], tuple(ids[:2])),),
        targets=tuple(replace(t, label=HOSTILE[1], text=HOSTILE[2]) for t in graph.targets),
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(folder):
    access = Access()
    app = create_app(Workbench([Store.open(folder)]), access)
    with TestClient(app, base_url="http://localhost") as client:
        client.headers["X-Gemscope"] = access.page_token
        yield client


@pytest.fixture
def copy(client, folder, area):
    """The name of a graph of a test's own."""
    file = folder / "graphs" / "copy.safetensors"
    save_graph(area, file)
    yield "copy"
    file.unlink(missing_ok=True)


def a_feature(graph, n=0):
    return [node for node in graph.nodes if node.kind is Kind.FEATURE][n]


def test_the_list(client, area):
    found = {one["name"]: one for one in client.get("/api/graphs").json()["graphs"]}
    assert (found["area"]["nodes"], found["area"]["prompt"]) == (len(area.nodes), PROMPT)
    assert "get it again" in found["broken"]["mistake"]
    page = client.get("/graphs").text
    assert "/graph/area" in page
    assert "get it again" in page
    sets = client.get("/api/graphs").json()["sets"]
    assert len(sets[0]["addresses"]) == 6
    assert {one["kind"] for one in sets} == {"transcoder", "clt"}


def test_the_twin_is_the_graph(client, area):
    said = client.get("/api/graph/area").json()
    plain = area.json()
    assert said["edges"] == plain["edges"]
    assert [n["id"] for n in said["nodes"]] == [n["id"] for n in plain["nodes"]]
    columns = client.get("/api/graph/area?edges=columns").json()
    ids = [n["id"] for n in columns["nodes"]]
    again = [
        {"source": ids[s], "target": ids[t], "weight": w}
        for s, t, w in zip(*columns["edges"].values(), strict=True)
    ]
    assert again == plain["edges"]


def test_books_close_on_what_the_page_gets(client):
    said = client.get("/api/graph/area").json()
    sums = {n["id"]: n["remainder"] for n in said["nodes"] if n["value"] is not None}
    for edge in said["edges"]:
        sums[edge["target"]] += edge["weight"]
    assert len(sums) > 20
    for node in said["nodes"]:
        if node["id"] in sums:
            assert sums[node["id"]] == pytest.approx(node["value"], abs=1e-4)


def test_labels_of_the_store_are_shown(client, folder, indexed):
    nodes = [Node(Kind.FEATURE, 0, 1, 3, 1.0), Node(Kind.EMBEDDING, position=1),
             Node(Kind.TARGET, number=0)]  # fmt: skip
    graph = graph_of(
        nodes, {("embedding.1", "feature.0.3.1"): 1.0, ("feature.0.3.1", "target.0"): 2.0},
        dictionaries=(indexed[0],),
    )  # fmt: skip
    file = folder / "graphs" / "labelled.safetensors"
    save_graph(graph, file)
    given = {"id": "feature.0.3.1", "label": "my own name", "note": True}
    said = client.post("/api/graph/labelled/name", json=given).json()
    assert said == {"id": "feature.0.3.1", "label": "my own name", "noted": True}
    notes = client.get("/api/notes", params={"feature": f"{indexed[0]}/3"}).json()
    assert notes[0]["text"] == "my own name"
    save_graph(graph, file)  # the file has no name for it: the store does
    assert client.get("/api/graph/labelled").json()["nodes"][0]["label"] == "my own name"
    card = client.get("/graph/labelled/node?id=feature.0.3.1").text
    assert "my own name" in card
    assert 'class="context"' in card
    assert f"/feature/{indexed[0]}/3" in card
    file.unlink()


def test_the_card_of_a_feature_that_is_not_indexed(client, area):
    card = client.get("/graph/area/node", params={"id": a_feature(area).id}).text
    assert "gemscope index" in card
    assert card.count('class="token"') == 8
    answer = client.get("/graph/area/node?id=target.0", headers={"HX-Request": "true"})
    assert (answer.status_code, "is no feature" in answer.text) == (422, True)


def test_groups_pins_and_names_are_kept(client, folder, copy, area):
    one, two = a_feature(area, 0).id, a_feature(area, 1).id
    view = {"groups": [{"label": "both", "ids": [one, two]}], "pinned": [one, "embedding.1"]}
    assert client.post(f"/api/graph/{copy}/view", json=view).json() == {"groups": 1, "pinned": 2}
    client.post(f"/api/graph/{copy}/name", json={"id": two, "label": " 乘法 "})
    kept = load_graph(folder / "graphs" / "copy.safetensors")
    assert (kept.groups, kept.pinned) == ((Group("both", (one, two)),), (one, "embedding.1"))
    assert kept.labels[two] == "乘法"
    assert closes(kept, 1e-3)
    client.post(f"/api/graph/{copy}/name", json={"id": two, "label": ""})
    client.post(f"/api/graph/{copy}/view", json={"pinned": []})
    kept = load_graph(folder / "graphs" / "copy.safetensors")
    assert (two in kept.labels, kept.pinned, len(kept.groups)) == (False, (), 1)


def test_scores_of_a_part(client, area):
    every = [n.id for n in area.nodes if n.kind is Kind.FEATURE]
    said = client.post("/api/graph/area/scores", json={"ids": every}).json()
    assert said["part"] == pytest.approx(said["shown"])
    none = client.post("/api/graph/area/scores", json={"ids": []}).json()
    assert none["part"]["replacement"] < said["part"]["replacement"]
    assert said["whole"]["replacement"] == pytest.approx(area.scores.replacement)


def strongest(graph, target="target.0"):
    """The feature with the largest edge to a target, and its weight."""
    at = graph.place(target)
    edges = zip(graph.edges.source.tolist(), graph.edges.target.tolist(),
                graph.edges.weight.tolist(), strict=True)  # fmt: skip
    some = [(w, s) for s, t, w in edges if t == at and graph.nodes[s].kind is Kind.FEATURE]
    weight, place = max(some, key=lambda pair: abs(pair[0]))
    return graph.nodes[place], weight


def test_intervening_runs_the_model(client, area, miniature):
    node, weight = strongest(area)
    same = client.post("/api/graph/area/intervene", json={"ids": [node.id], "multiple": 1}).json()
    assert all(one["before"] == one["after"] for one in same["tokens"])
    said = client.post("/api/graph/area/intervene", json={"ids": [node.id], "multiple": 0}).json()
    assert any(one["before"] != one["after"] for one in said["tokens"])
    with torch.no_grad():
        probabilities = miniature.run(PROMPT, logits=True).logits[0, -1].softmax(0)
    assert said["tokens"][0]["before"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    first = said["targets"][0]
    # What the edges say has the sign of what the model does, for the strongest of them.
    assert first["predicted"] * weight < 0
    assert (first["after"] - first["before"]) * first["predicted"] > 0


def test_prediction_follows_paths():
    from gemscope.explorer._graph_change import predicted

    nodes = [Node(Kind.EMBEDDING, position=0), Node(Kind.FEATURE, 0, 0, 1, 4.0),
             Node(Kind.FEATURE, 1, 0, 2, 2.0), Node(Kind.TARGET, number=0)]  # fmt: skip
    one, two = nodes[1].id, nodes[2].id
    graph = graph_of(
        nodes,
        {
            ("embedding.0", one): 4.0,
            (one, two): 1.0,
            (one, "target.0"): 3.0,
            (two, "target.0"): 5.0,
        },
    )
    # Twice the first: 1 more reaches the second, half of what it has, which is half of 5.
    assert predicted(graph, [one], 2) == [pytest.approx(3.0 + 2.5)]
    assert predicted(graph, [one, two], 0) == [pytest.approx(-8.0)]


def test_comparing(client):
    said = client.get("/api/graphs/compare?first=area&second=area").json()
    assert (said["jaccard"], said["first"], said["second"]) == (1.0, [], [])
    other = client.get("/api/graphs/compare?first=area&second=random").json()
    assert (other["jaccard"], other["shared"]) == (0.0, [])
    page = client.get("/graph/area?with=random").text
    check_page(page)
    assert 'data-api="/api/graph/random"' in page


def test_files_to_keep(client, area, tmp_path):
    for layout, suffix, read in (
        ("own", "safetensors", load_graph),
        ("circuit-tracer", "json", import_graph),
    ):
        answer = client.get(f"/graph/area/file?layout={layout}")
        assert f'filename="area.{suffix}"' in answer.headers["Content-Disposition"]
        file = tmp_path / f"got.{suffix}"
        file.write_bytes(answer.content)
        # circuit-tracer's files have no place for what the books are closed with.
        kept = [n for n in area.nodes if n.kind not in (Kind.BOS, Kind.BIAS)]
        assert len(read(file).nodes) in (len(area.nodes), len(kept))


def lines(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_tracing_keeps_the_graph(client, folder):
    given = {"prompt": "for i in range(", "dictionaries": [SET], "targets": ["logit:len"]}
    *way, last = lines(client.post("/api/graphs", json=given))
    name = last["done"]["name"]
    assert any("planned" in piece for piece in way)
    graph = load_graph(folder / "graphs" / f"{name}.safetensors")
    assert (graph.prompt, graph.targets[0].text) == ("for i in range(", "logit:len")
    # What is traced again does not replace what somebody may have named and grouped.
    again = lines(client.post("/api/graphs", json=given))[-1]["done"]["name"]
    assert again == f"{name}-2"
    for one in (name, again):
        (folder / "graphs" / f"{one}.safetensors").unlink()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": ["vector:/etc/passwd"]}, "no target of this page"),
        ({"dictionaries": ["/etc"]}, "neither indexed"),
        ({"dictionaries": ["../store"]}, "neither indexed"),
        ({"dictionaries": []}, "dictionaries"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x " * 9_999}, "tokens"),
        ({"node_threshold": 2}, "node_threshold"),
        ({"targets": ["feature:nothing/3"]}, "nothing"),
        ({"dictionaries": ["gemma-scope-2b-pt-transcoders"]}, "not here|different|download"),
    ],
)
def test_what_tracing_refuses(client, given, said):
    import re

    asked = {"prompt": "def f(x):", "dictionaries": [SET], **given}
    answer = client.post("/api/graphs", json=asked)
    told = answer.json()["detail"] if answer.status_code == 422 else lines(answer)[-1]["error"]
    assert re.search(said, told), told


@pytest.mark.parametrize(
    "name", ["none", "../area", "..%2farea", "%2fetc%2fpasswd", "area.safetensors", "a" * 5000]
)
def test_a_name_is_no_path(client, name):
    for path in (f"/api/graph/{name}", f"/graph/{name}/file", f"/graph/{name}"):
        assert client.get(path).status_code in (404, 422), path


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("view", {"pinned": ["feature.99.99.99"]}),
        ("view", {"groups": [{"label": "", "ids": ["target.0"]}]}),
        ("view", {"groups": [{"label": label, "ids": ["target.0"]} for label in "ab"]}),
        ("view", {"groups": [{"label": "a", "ids": []}]}),
        ("name", {"id": "nobody", "label": "x"}),
        ("name", {"id": "target.0", "label": "x" * 201}),
        ("scores", {"ids": ["nobody"]}),
        ("intervene", {"ids": ["target.0"], "multiple": 0}),
        ("intervene", {"ids": ["nobody"], "multiple": 0}),
        ("intervene", {"ids": [], "multiple": 0}),
        ("intervene", {"ids": ["target.0"], "multiple": 1e9}),
    ],
)  # fmt: skip
def test_what_changes_are_refused(client, folder, path, given):
    before = (folder / "graphs" / "area.safetensors").read_bytes()
    answer = client.post(f"/api/graph/area/{path}", json=given)
    assert (answer.status_code, "detail" in answer.json()) == (422, True)
    assert (folder / "graphs" / "area.safetensors").read_bytes() == before


def test_writing_needs_the_token_of_a_page(client):
    for path in ("graphs", "graph/area/view", "graph/area/name", "graph/area/intervene"):
        answer = client.post(f"/api/{path}", json={}, headers={"X-Gemscope": "guessed"})
        assert answer.status_code == 403


def test_nothing_of_a_graph_runs(client):
    pages = ["/graphs", "/graph/hostile", "/graph/area?with=hostile", "/graph/hostile?with=area"]
    pages += [
        f"/graphs?prompt={quote(one)}&target={quote(one)}&with={quote(one)}" for one in HOSTILE
    ]
    for path in pages:
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        check_page(answer.text)
    assert client.get("/api/graph/hostile").headers["content-type"] == "application/json"
    for one in HOSTILE:
        answer = client.get("/graph/hostile/node", params={"id": one})
        assert answer.status_code == 422
        check_page(answer.text)


def test_a_feature_leads_to_its_trace(client, indexed):
    page = client.get(f"/feature/{indexed[0]}/3").text
    url = next(a["href"] for t, a in Reader(page).tags if a.get("href", "").startswith("/graphs?"))
    form = client.get(url).text
    assert f"feature:{indexed[0]}/3" in form
    mine = f"{SET}/layer_2_width_192_l0_big/5"
    form = client.get("/graphs", params={"target": f"feature:{mine}"}).text
    assert f'value="{SET}/layer_*_width_192_l0_big"' in form


def test_documented(client):
    paths = client.get("/api/openapi.json").json()["paths"]
    for path in ("/api/graphs", "/api/graph/{name}", "/api/graphs/compare",
                 "/api/graph/{name}/intervene", "/api/graph/{name}/scores"):  # fmt: skip
        assert path in paths
    assert "post" in paths["/api/graphs"]


def test_files_given_to_serve(folder, area, tmp_path):
    file, foreign = tmp_path / "given.safetensors", tmp_path / "foreign.json"
    save_graph(area, file)
    from gemscope.circuits import export_graph

    export_graph(area, foreign)
    bench = open_workbench([folder, file, foreign])
    access = Access()
    with TestClient(create_app(bench, access), base_url="http://localhost") as client:
        client.headers["X-Gemscope"] = access.page_token
        assert client.get("/api/graph/given").json()["prompt"] == PROMPT
        one = next(n["id"] for n in client.get("/api/graph/foreign").json()["nodes"])
        # JSON has no place for what is kept: the graph moves into the store.
        client.post("/api/graph/foreign/view", json={"pinned": [one]})
        kept = folder / "graphs" / "foreign.safetensors"
        assert load_graph(kept).pinned == (one,)
        kept.unlink()
    with pytest.raises(InputError, match="no file"):
        open_workbench([folder, tmp_path / "none.safetensors"])
