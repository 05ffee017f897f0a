"""Multi-layer models go through everything a single-layer one does.

A crosscoder put together from single-layer dictionaries, each writing only its own layer, must give
each layer just the figures of its dictionary.
"""

import json

import pytest
import torch

from gemscope import formats, hub
from gemscope.errors import InputError
from gemscope.evaluate import Settings, evaluate
from gemscope.features import look
from gemscope.lm import splice
from gemscope.sae import CrossLayer, JumpReLU, Layer, Origin
from gemscope.sites import Site, Sites

LAYERS = (1, 3, 4)


@pytest.fixture(scope="module")
def singles(entries):
    """The residual-stream dictionaries of the miniature, by layer."""
    of = {e.address: e for e in entries}
    name = "miniature/resid_post_all/layer_{}_width_384_l0_big"
    return [hub.build(of[name.format(layer)]) for layer in LAYERS]


def layer(sae, place, count):
    w_dec = torch.zeros(sae.d_sae, count, sae.d_out)
    w_dec[:, place] = sae.w_dec.float()
    return Layer(
        w_enc=sae.w_enc.float(),
        b_enc=sae.b_enc,
        threshold=sae.activation.threshold,
        w_dec=w_dec,
        b_dec=sae.b_dec,
    )


@pytest.fixture(scope="module")
def crosscoder(singles):
    sites = Sites(Site.parse(f"{n}.resid_post") for n in LAYERS)
    layers = tuple(layer(sae, place, len(singles)) for place, sae in enumerate(singles))
    origin = Origin(model="gemscope/miniature", l0=120.0)
    return CrossLayer(layers=layers, reads=sites, writes=sites, origin=origin)


@pytest.fixture(scope="module")
def folder(crosscoder, tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / "layer_1_3_4_width_6k_l0_medium"
    return hub.save_sae(crosscoder, place)


@pytest.fixture(scope="module")
def documents():
    from gemscope.corpus import Document, read_text

    return [Document(d.path, d.text[:900]) for d in read_text("miniature")][:4]


def test_each_layer_has_the_figures_of_its_dictionary(miniature, singles, crosscoder, documents):
    settings = Settings(tokens=900)
    *alone, (together) = evaluate(miniature, [*singles, crosscoder], documents, settings)
    for single, of_layer in zip(alone, together.layers, strict=True):
        for name in ("l0", "fvu", "mse", "loss_spliced", "delta_loss"):
            assert of_layer[name] == pytest.approx(single.metrics[name], rel=1e-4, abs=1e-5), name
    assert together.metrics["l0"] == pytest.approx(sum(s.metrics["l0"] for s in alone), rel=1e-6)
    # The total is of everything written: errors add up, and so do variances.
    mse = [s.metrics["mse"] for s in alone]
    assert together.metrics["mse"] == pytest.approx(sum(mse) / 3, rel=1e-5)
    errors = sum(mse)
    variances = sum(s.metrics["mse"] / s.metrics["fvu"] for s in alone)
    assert together.metrics["fvu"] == pytest.approx(errors / variances, rel=1e-5)
    # Spliced together: what the last layer writes hides the others, but its input has changed.
    assert together.metrics["delta_loss"] > alone[-1].metrics["delta_loss"]
    assert together.baseline["fvu"] > 2 * together.metrics["fvu"]


def test_chosen_layers_are_spliced(miniature, singles, crosscoder, documents):
    settings = Settings(tokens=900, layers=(3,))
    alone, chosen = evaluate(miniature, [singles[1], crosscoder], documents, settings)
    for name in ("delta_loss", "kl", "loss_mean", "loss_zero", "loss_recovered_mean"):
        assert chosen.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-4, abs=1e-5)
    with pytest.raises(InputError, match=r"writes 1,3,4\.resid_post, and not in layer 2"):
        evaluate(miniature, [crosscoder], documents, Settings(tokens=900, layers=(2, 3)))


def test_look_says_the_layer_of_each_feature(miniature, singles, crosscoder):
    text = "def mean(values):"
    seen = look(miniature, crosscoder, text)
    firsts = crosscoder.firsts
    for place, sae in enumerate(singles):
        own = look(miniature, sae, text).features
        part = crosscoder.split(seen.features)[place]
        assert torch.equal(part.indices, own.indices)
        torch.testing.assert_close(part.values, own.values)
    assert seen.name(firsts[1] + 5) == f"{firsts[1] + 5} (3)"
    assert {f["layer"] for row in seen.json(500)["features"] for f in row} == set(LAYERS)


def test_a_folder_of_layers_is_evaluated_and_reported(command, folder, tmp_path):
    code, out, err = command(
        "eval", folder, "--tokens", 300, "--out", tmp_path, "--json", "--context", 128
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["kind"], found["reads"]) == ("crosscoder", "1,3,4.resid_post")
    assert [row["site"] for row in found["layers"]] == [f"{n}.resid_post" for n in LAYERS]
    assert found["importance_uniformity"] is None
    page = (tmp_path / found["report"].split("/")[-2] / "report.html").read_text("utf-8")
    assert "Layer by layer" in page
    assert "A crosscoder with 1,152 features" in page
    code, out, _ = command("info", folder, "--json")
    assert json.loads(out)["shapes"]["w_dec"] == [384, 3, 256]


@pytest.mark.parametrize("feature", [None, 800])
def test_look_of_a_folder_is_drawn(command, folder, tmp_path, feature):
    more = [] if feature is None else ["--feature", feature]
    file = tmp_path / "look.svg"
    code, out, err = command("look", "def f(x):", "--sae", folder, "--plot", file, *more)
    assert code == 0, err
    assert "(3)" in out
    assert file.stat().st_size > 10_000


def test_the_written_folder_reads_back_the_same(crosscoder, folder):
    again = hub.load_sae(str(folder))
    assert (again.reads, again.writes, again.kind) == (
        crosscoder.reads, crosscoder.writes, "crosscoder",
    )  # fmt: skip
    for mine, theirs in zip(again.layers, crosscoder.layers, strict=True):
        for name in ("w_enc", "b_enc", "threshold", "w_dec", "b_dec"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert formats.inspect(folder).kind == "crosscoder"


def test_the_whole_splice_sees_earlier_edits(miniature, singles, crosscoder):
    """Together, each layer encodes what the edited pass gives it: as three splices in a row."""
    text = "import os\nprint(os.sep)"
    together = miniature.run(text, edits=[splice(crosscoder)], logits=True).logits
    one_by_one = miniature.run(text, edits=[splice(s) for s in singles], logits=True).logits
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-3)


def test_single_layer_models_write_one_site(singles):
    with pytest.raises(InputError, match=r"writes 1\.resid_post and nothing else"):
        splice(singles[0], [Site.parse("3.resid_post")])
    assert isinstance(singles[0].activation, JumpReLU)
