"""The scope: what it shows of a release, and where its figures are from."""

import json
import time

import pytest
from fastapi.testclient import TestClient

from gemscope import hub
from gemscope.explorer import Workbench, create_app
from gemscope.explorer._scope import Cell, _panels, _Scale
from gemscope.explorer._scope_plots import plots
from gemscope.features import Store


def client_of(store, **options):
    stores = [Store.open(store)] if store else []
    return TestClient(create_app(Workbench(stores, **options)), base_url="http://localhost")


@pytest.fixture(scope="module")
def client(small_store):
    with client_of(small_store) as made:
        yield made


def record(address, **changes):
    return {
        "address": address, "tokens": 1_000, "l0": 10.0, "fvu": 0.25, "delta_loss": 0.125,
        "dead_fraction": 0.5, "provenance": {"time": "2026-01-02T03:04:05+00:00"},
    } | changes  # fmt: skip


@pytest.fixture
def reported(small_store, tmp_path):
    """The API's cells by address, with reports of the given names and contents."""

    def read(release="gemma-scope-2b-pt-res", **files):
        for name, content in files.items():
            folder = tmp_path / name
            folder.mkdir()
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "report.json").write_text(text)
        with client_of(small_store, reports=tmp_path) as client:
            found = client.get("/api/scope", params={"release": release}).json()
        return found, {c["address"]: c for c in found["cells"]}

    return read


def test_everything_of_the_bundled_release_is_there(client, entries, indexed):
    found = client.get("/api/scope").json()
    assert (found["release"], found["artefacts"], found["indexed"]) == ("miniature", 66, 2)
    assert {c["address"] for c in found["cells"]} == {e.address for e in entries}
    assert {c["address"] for c in found["cells"] if c["indexed"]} == set(indexed)


def test_figures_are_those_of_the_makers(client, entries):
    cells = {c["address"]: c for c in client.get("/api/scope").json()["cells"]}
    for entry in entries:
        known, cell = hub.published(entry), cells[entry.address]
        for ours, theirs in (("l0", "l0"), ("fvu", "fvu"), ("delta_loss", "delta_loss"),
                             ("dead", "dead_fraction")):  # fmt: skip
            assert cell["figures"][ours] == known[theirs]
            assert cell["sources"][ours] == known["source"]
        assert cell["nominal_l0"] == entry.l0


def test_what_nobody_measured_is_missing_not_zero(client):
    found = client.get("/api/scope?release=gemma-scope-2b-pt-res").json()
    assert found["measured"] == 0
    for cell in found["cells"]:
        assert set(cell["figures"].values()) == {None}
        assert cell["nominal_l0"] > 0
    page = client.get("/scope?release=gemma-scope-2b-pt-res&colour=fvu").text
    assert page.count('class="c none"') == found["artefacts"]
    assert "FVU 0" not in page
    assert "Nothing to plot" in page
    assert 'class="c none"' not in client.get("/scope?release=gemma-scope-2b-pt-res&colour=l0").text


def test_reports_come_first_the_newest_of_all(reported):
    addresses = [e.address for e in hub.catalog(release="gemma-scope-2b-pt-res")[:2]]
    old = {"provenance": {"time": "2025-01-01T00:00:00+00:00"}}
    _, cells = reported(
        b=[record(addresses[0], fvu=0.75)],
        a=[record(addresses[0], fvu=0.5, **old), record(addresses[1], fvu=None, l0=float("nan"))],
    )
    first, second = (cells[a] for a in addresses)
    assert first["figures"] == {"l0": 10.0, "fvu": 0.75, "delta_loss": 0.125, "dead": 0.5}
    assert first["sources"]["fvu"] == "report of 2026-01-02, 1,000 tokens"
    assert second["figures"] == {"l0": None, "fvu": None, "delta_loss": 0.125, "dead": 0.5}


def test_a_report_replaces_what_makers_published(reported, indexed):
    _, cells = reported("miniature", a=[record(indexed[0])])
    assert cells[indexed[0]]["figures"]["fvu"] == 0.25
    assert cells[indexed[1]]["figures"]["fvu"] != 0.25


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"address": "a"}', '[{"address": 3}]', "[" * 100_000, "?"],
    ids=range(6),
)  # fmt: skip
def test_what_is_no_report_is_named(reported, content):
    found, _ = reported("miniature", strange=content)
    assert found["unreadable"] == ["strange/report.json"]
    assert found["measured"] == 66


def test_a_report_that_changes_is_read_again(small_store, tmp_path, indexed):
    file = tmp_path / "report.json"
    file.write_text(json.dumps([record(indexed[0], fvu=0.1)]))
    with client_of(small_store, reports=tmp_path) as client:

        def fvu():
            cells = client.get("/api/scope").json()["cells"]
            return next(c["figures"]["fvu"] for c in cells if c["address"] == indexed[0])

        assert fvu() == 0.1
        file.write_text(json.dumps([record(indexed[0], fvu=0.1234)]))
        assert fvu() == 0.1234


@pytest.mark.parametrize("release", [s.name for s in hub.releases()])
def test_every_release_is_shown_whole(client, release):
    found = client.get("/api/scope", params={"release": release}).json()
    assert found["artefacts"] == len(hub.catalog(release=release))
    page = client.get("/scope", params={"release": release})
    assert page.status_code == 200
    assert page.text.count('<a class="c') == found["artefacts"]


def test_a_release_of_thousands_is_quick(client):
    def seconds():
        began = time.perf_counter()
        assert client.get("/scope?release=gemma-scope-2-27b-it&colour=l0").status_code == 200
        return time.perf_counter() - began

    seconds()  # the catalog is expanded once
    # 0.04 s by itself; here every call is checked for its types.
    assert min(seconds() for _ in range(5)) < 0.4


def test_cells_lead_to_maps_and_details(client, indexed):
    page = client.get("/scope").text
    for address in indexed:
        assert f'href="/map/{address}"' in page
    other = "miniature/clt/width_384_l0_medium_affine"
    assert f"at={other}#chosen" in page
    chosen = client.get("/scope", params={"at": other})
    assert f"gemscope index {other} --to STORE" in chosen.text
    assert "gemscope download" not in chosen.text
    far = hub.catalog(release="gemma-scope-2b-pt-res")[0].address
    assert f"gemscope download {far}" in client.get("/scope", params={"at": far}).text


def test_mistakes_are_told(client):
    answer = client.get("/api/scope?release=gemma-scop-2b-pt-res")
    assert (answer.status_code, "nearest: gemma-scope-2b-pt-res" in answer.text) == (422, True)
    assert client.get("/scope?at=miniature/none").status_code == 422
    assert client.get("/scope?colour=red").status_code == 422


def test_without_a_store_the_bundled_release_is_shown():
    with client_of(None) as client:
        assert client.get("/api/scope").json()["release"] == "miniature"
        assert client.get("/scope?release=others").status_code == 200


def cell(layer="0", d_sae=10, l0=1.0, part="SAE", **figures):
    known = {"l0": None, "fvu": None, "delta_loss": None, "dead": None} | figures
    return Cell(
        f"r/{part}{layer}/{d_sae}/{l0}", part, layer, d_sae, l0, False, False, False, known, {}
    )


def test_a_panel_has_each_layer_and_width():
    found = _panels([cell("0"), cell("0", l0=3.0), cell("1", l0=2.0), cell("1", 20, None)])
    (panel,) = found
    assert panel.layers == ["0", "1"]
    assert [(line.d_sae, line.l0) for line in panel.lines] == [(10, "1–2"), (10, "3"), (20, "?")]
    assert [[c and c.nominal_l0 for c in line.cells] for line in panel.lines] == [
        [1.0, 2.0], [3.0, None], [None, None],
    ]  # fmt: skip
    assert panel.lines[2].cells[1].d_sae == 20


def test_a_scale_runs_from_the_least_to_the_most():
    cells = [cell(fvu=0.2), cell(fvu=0.6), cell()]
    scale = _Scale.of(cells, "fvu")
    assert [scale.share(v) for v in (0.2, 0.4, 0.6)] == pytest.approx([0, 0.5, 1])
    # Of an L0 in logarithms, and the nominal one where there is no other.
    scale = _Scale.of([cell(l0=1.0), cell(l0=100.0)], "l0")
    assert scale.share(10) == pytest.approx(0.5)
    assert scale.steps() == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    assert _Scale.of([cell()], "fvu") is None
    assert _Scale.of([cell(fvu=0.2)], "fvu").share(0.2) == 0.5


def test_plots_have_what_was_measured():
    def measured(layer, d_sae, l0):
        made = cell(layer, d_sae, l0, fvu=0.1 * l0 / d_sae)
        return Cell(
            *[getattr(made, n) for n in Cell.__slots__[:8]], made.figures | {"l0": l0 + 0.5}, {}
        )

    cells = [measured("0", 8, 1), measured("0", 8, 2), measured("0", 8, 4), measured("0", 16, 2)]
    pareto, width, steps = plots([*cells, cell("3", 8, 9)], "fvu")
    assert [len(line["points"]) for line in pareto["lines"]] == [3, 1]
    assert pareto["lines"][0]["points"][0] == [1.5, pytest.approx(0.0125), cells[0].address]
    assert [[p[0] for p in line["points"]] for line in width["lines"]] == [[8, 16]]
    assert [len(line["points"]) for line in steps["lines"]] == [3]
    assert plots([cell()], "fvu") == []
    assert plots(cells, "l0")[0]["y"] == "FVU"
