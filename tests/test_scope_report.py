"""Many dictionaries at once: patterns of addresses, and figures that dozens still fit into."""

import json
import re
from dataclasses import replace

import pytest

from gemscope import hub
from gemscope.corpus import Document
from gemscope.evaluate import Settings, evaluate, record, write_report
from gemscope.evaluate._scope_figures import scope_figures


@pytest.fixture(scope="module")
def one(miniature, residual):
    documents = [
        Document("a", "def f(x):\n    return x + 1\n" * 4),
        Document("b", "import os\n" * 9),
    ]
    settings = Settings(tokens=60)
    (found,) = evaluate(miniature, [residual], documents, settings)
    entry = hub.locate("miniature/resid_post/layer_3_width_2k_l0_medium")
    return record(miniature, residual, entry, found, documents, settings, text="two lines")


def scope(one):
    """Two L0s of six layers, a ladder of three more L0s and two more widths, and a transcoder."""
    made = [
        (f"{layer}.resid_post", f"{layer}.resid_post", 384, l0) for layer in range(6)
        for l0 in (24, 96)
    ]  # fmt: skip
    made += [("3.resid_post", "3.resid_post", 384, l0) for l0 in (12, 48)]
    made += [("3.resid_post", "3.resid_post", width, 48) for width in (1_024, 2_048)]
    made += [("3.mlp_in", "3.mlp_out", 384, l0) for l0 in (16, 56)]
    return [
        replace(
            one,
            address=f"a/{place}",
            reads=reads,
            writes=writes,
            d_sae=width,
            nominal_l0=float(l0),
            metrics=one.metrics | {"l0": l0 + 0.5, "fvu": 4 / l0 / width**0.1},
        )
        for place, (reads, writes, width, l0) in enumerate(made)
    ]


def test_figures_of_a_scope_have_a_panel_for_each_stream_and_name_layers_once(one):
    drawn = scope_figures(scope(one))
    assert set(drawn) == {"pareto", "loss", "ladders"}
    pareto = drawn["pareto"]
    for text in ("resid_post", "mlp_in to mlp_out"):
        assert pareto.count(f"<!-- {text} -->") == 1
    for layer in range(6):
        assert pareto.count(f"<!-- layer {layer} -->") == 1
    assert "3.resid_post, L0 48" in drawn["ladders"]
    assert "3.resid_post, 384 wide" in drawn["ladders"]


def test_without_ladders_there_is_no_figure_of_them(one):
    few = [r for r in scope(one) if (r.d_sae, r.nominal_l0) in ((384, 24), (384, 96))]
    assert set(scope_figures(few)) == {"pareto", "loss"}


def test_the_report_of_many_has_them_and_that_of_few_has_one_legend(one, tmp_path):
    many, few = tmp_path / "many", tmp_path / "few"
    for folder, records in ((many, scope(one)), (few, scope(one)[:3])):
        folder.mkdir()
        write_report(folder, records, title="A scope")
    assert {f.stem for f in (many / "figures").iterdir()} == {"pareto", "loss", "ladders"}
    assert "density" in {f.stem for f in (few / "figures").iterdir()}
    page = (many / "report.html").read_text("utf-8")
    assert page.count("<svg") == 3
    assert len(re.findall(r'<h2 id="d\d+">', page)) == len(scope(one))


@pytest.mark.slow
def test_a_pattern_stands_for_the_addresses_it_matches(command, refused, tmp_path):
    wanted = [e.address for e in hub.catalog(release="miniature") if "/layer_3_" in e.address]
    options = ("--tokens", "64", "--out", tmp_path, "--json")
    code, out, err = command("eval", "miniature/*/layer_3_*", *options)
    assert code == 0, err
    found = json.loads(out)
    assert [r["address"] for r in (found if isinstance(found, list) else [found])] == wanted
    refused("eval", "miniature/none*", match="no address of the catalog matches miniature/none")
