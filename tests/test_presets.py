"""The shipped configs: each parses, those of the miniature run, the others name what there is."""

from pathlib import Path

import pytest
from training import weights

from gemscope import hub
from gemscope.sites import each
from gemscope.train import read_config, smoke_test, train

PRESETS = Path(__file__).parents[1] / "presets"


def files(folder):
    return [pytest.param(f, id=f.stem) for f in sorted((PRESETS / folder).glob("*.yaml"))]


def test_there_are_presets():
    for folder in ("miniature", "published"):
        assert len(files(folder)) >= 5


def test_none_lies_elsewhere():
    everywhere = {f for f in PRESETS.rglob("*") if f.suffix in (".yaml", ".yml")}
    assert everywhere == {p.values[0] for d in ("miniature", "published") for p in files(d)}


@pytest.mark.parametrize("file", files("miniature"))
def test_those_of_the_miniature_parse(file):
    chosen = read_config(file)
    assert chosen.model == "miniature"
    assert all(site.layer < 6 for site in chosen.sites)


@pytest.mark.parametrize("file", files("published"))
def test_published_ones_name_models_of_the_catalog(file):
    chosen = read_config(file)
    entries = hub.catalog()
    assert chosen.model in {e.model for e in entries}
    for a in chosen.artefacts:
        if a.start is not None:
            (entry,) = (e for e in entries if e.address == a.start)
            assert (entry.reads, entry.writes, entry.d_sae) == (a.reads, a.writes, a.d_sae)
    assert chosen.steps > 0


@pytest.mark.slow
@pytest.mark.parametrize("file", files("miniature"))
def test_those_of_the_miniature_pass_their_smoke_test(file, miniature, tmp_path):
    # Text that is read in a moment, and a model that is loaded already.
    chosen = smoke_test(
        read_config(file, [f"out={tmp_path / 'run'}", "data.text=miniature", "model_dtype=float32"])
    )
    folder = train(chosen, model=miniature)
    for a in chosen.artefacts:
        found = weights(folder / a.name)
        assert sum(v.shape[1] for n, v in found.items() if n.endswith("w_enc")) == a.d_sae
        assert len(each(a.reads)) == len({n.split(".")[0] for n in found})
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("file", files("published"))
def test_published_ones_have_a_smoke_test_on_the_miniature(file):
    chosen = smoke_test(read_config(file))
    assert chosen.model == "miniature"
    assert all(site.layer < 6 for site in chosen.sites)
    assert chosen.steps == 30
    assert [a.kind for a in chosen.artefacts] == [
        a.kind for a in read_config(file).artefacts[: len(chosen.artefacts)]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", files("published"))
def test_published_ones_pass_it(file, miniature, tmp_path):
    chosen = smoke_test(read_config(file, [f"out={tmp_path / 'run'}"]))
    # Two are as good as twelve.
    chosen = chosen.model_copy(update={"artefacts": chosen.artefacts[:2]})
    folder = train(chosen, model=miniature)
    assert all((folder / a.name).is_dir() for a in chosen.artefacts)
