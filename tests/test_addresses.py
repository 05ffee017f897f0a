"""From an address to a dictionary: what files say, what names say, and what the user must say."""

import json

import pytest
import torch

from gemscope import formats, hub
from gemscope.errors import InputError
from gemscope.hub import Given, load_sae, locate, save_sae
from gemscope.sae import SAE, JumpReLU, Origin, ReLU, TopK
from gemscope.sites import Site, Sites

D, WIDTH = 6, 10


@pytest.fixture
def part(generator):
    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    return formats.Part(
        w_enc=rand(D, WIDTH), b_enc=rand(WIDTH), w_dec=rand(WIDTH, D), b_dec=rand(D),
        threshold=rand(WIDTH).abs(),
    )  # fmt: skip


@pytest.fixture
def npz(part, tmp_path):
    """Write a folder in Gemma Scope's layout, which says nothing but numbers."""

    def make(path):
        formats.write_gemma_scope(tmp_path / path, part)
        return str(tmp_path / path)

    return make


def test_a_place_in_its_release_says_what_an_npz_cannot(npz):
    entry = locate(npz("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"))
    assert str(entry.reads) == str(entry.writes) == "20.resid_post"
    assert (entry.model, entry.l0, entry.canonical) == ("google/gemma-2-2b", 71.0, True)
    assert entry.d_sae == WIDTH, "widths come from the file, never from its name"
    assert entry.licence == "CC-BY-4.0"


def test_so_does_a_place_in_the_cache_of_the_hub(npz):
    commit = "0" * 40
    place = f"models--google--gemma-scope-2b-pt-transcoders/snapshots/{commit}"
    entry = locate(npz(f"{place}/layer_7/width_16k/average_l0_70"))
    assert (str(entry.reads), str(entry.writes)) == ("7.mlp_in_unscaled", "7.mlp_out")
    assert entry.kind == "transcoder"


def test_elsewhere_the_flags_that_say_it_are_named(npz, refused, command):
    folder = npz("somewhere/else")
    refused("info", folder, match="do not say which site .*--reads, such as --reads 20.resid_post")
    refused("info", folder, "--reads", "3.mlp_out", match="which model .*give it with --model")
    code, out, err = command(
        "info", folder, "--reads", "3.mlp_out", "--model", "google/gemma-2-2b", "--json"
    )
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["reads"], facts["writes"], facts["kind"]) == ("3.mlp_out", "3.mlp_out", "sae")
    sae = load_sae(folder, reads="3.mlp_in", writes="3.mlp_out", model="some/model")
    assert sae.is_transcoder
    refused("info", folder, "--reads", "3.nothing", match="no stream named 'nothing'")


def test_files_win_over_names_and_flags_must_not_contradict_them(part, tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_small"
    made = SAE(
        w_enc=part.w_enc, b_enc=part.b_enc, w_dec=part.w_dec, b_dec=part.b_dec,
        activation=JumpReLU(part.threshold), reads=Site.parse("3.mlp_out"),
        writes=Site.parse("3.mlp_out"), origin=Origin(model="someone/else", l0=4.0),
    )  # fmt: skip
    save_sae(made, folder)
    entry = locate(str(folder))
    assert (str(entry.reads), entry.model, entry.l0) == ("3.mlp_out", "someone/else", 4.0)
    with pytest.raises(InputError, match=r"--reads 5\.mlp_out contradicts the files"):
        locate(str(folder), Given(reads=Site.parse("5.mlp_out")))
    # A folder without its config, as some were published: its place says the rest.
    (folder / "config.json").unlink()
    entry = locate(str(folder))
    assert (str(entry.reads), entry.model) == ("7.resid_post", "google/gemma-3-1b-pt")


def test_embedding_dictionaries_are_converted_to_scaled_embeddings(npz, part):
    """Trained on embeddings as stored; the site holds them times the root of the width."""
    sae = load_sae(npz("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_44"))
    assert str(sae.reads) == "0.embed"
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(5))
    scaled = x * D**0.5
    pre = x.double() @ part.w_enc.double() + part.b_enc.double()
    f = torch.where(pre > part.threshold.double(), pre.clamp_min(0), 0.0)
    y = (f @ part.w_dec.double() + part.b_dec.double()) * D**0.5
    torch.testing.assert_close(sae.encode(scaled).dense().double(), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(scaled).double(), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sae.b_dec, part.b_dec), "the decoder's bias included"


@pytest.mark.parametrize(
    ("spelling", "address"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/canonical", "average_l0_71"),
        ("gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical", "average_l0_71"),
        ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_38", "average_l0_38"),
        ("fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x", "L15R-8x"),
    ],
)
def test_one_artefact_has_several_spellings(spelling, address):
    assert locate(spelling).address.split("/")[-1] == address


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        (
            "gemma-scope-2-1b-pt/resid_post/layer_20_width_65k_l0_medium",
            "gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium",
        ),
        (
            "gemma-scop-2b-pt-res/layer_3/width_16k/average_l0_60",
            "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59",
        ),
        ("llama-scope/L15Q-8x", "llama-scope/L15R-8x"),
    ],
)
def test_what_is_not_there_names_the_nearest(refused, typed, nearest):
    refused("info", typed, match=f"nearest: {nearest}")


@pytest.mark.parametrize("layout", hub.SAVED_LAYOUTS)
def test_every_writer_is_read_back_the_same(part, tmp_path, layout):
    site = Site.parse("3.resid_post")
    made = SAE(
        w_enc=part.w_enc, b_enc=part.b_enc, w_dec=part.w_dec, b_dec=part.b_dec,
        activation=JumpReLU(part.threshold), reads=site, writes=site,
        origin=Origin(model="google/gemma-2-2b", l0=4.0),
    )  # fmt: skip
    folder = save_sae(made, tmp_path / layout, layout=layout)
    again = load_sae(str(folder), reads="3.resid_post", model="google/gemma-2-2b")
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "reads", "writes"):
        mine, theirs = getattr(made, name), getattr(again, name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert torch.equal(again.activation.threshold, part.threshold)
    with pytest.raises(InputError, match="exists; choose another folder"):
        save_sae(made, folder, layout=layout)


def test_what_a_layout_cannot_hold_is_refused(part, tmp_path):
    site = Site.parse("3.resid_post")
    weights = {n: getattr(part, n) for n in ("w_enc", "b_enc", "w_dec", "b_dec")}
    for activation in (TopK(2), ReLU()):
        made = SAE(
            **weights, activation=activation, reads=site, writes=site, origin=Origin(model="a/b")
        )
        for layout in ("gemma-scope", "gemma-scope-2"):
            with pytest.raises(InputError, match="holds JumpReLU dictionaries"):
                save_sae(made, tmp_path / "x", layout=layout)
    with pytest.raises(InputError, match="no layout 'zip' to write: there are gemma-scope"):
        save_sae(made, tmp_path / "x", layout="zip")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_convert_writes_what_loads(command, entries, tmp_path):
    for layout in ("gemma-scope-2", "saelens"):
        code, out, err = command(
            "convert", entries[0].address, tmp_path / layout, "--layout", layout
        )
        assert code == 0, err
        assert "Load it: gemscope info" in out
    mine, theirs = (load_sae(str(tmp_path / n)) for n in ("gemma-scope-2", "saelens"))
    original = load_sae(entries[0].address)
    x = torch.randn(70, 256, generator=torch.Generator().manual_seed(2)) * 3
    for sae in (mine, theirs):
        assert torch.equal(sae.encode(x).indices, original.encode(x).indices)
        assert sae.origin.model == original.origin.model


def test_sites_are_written_and_parsed():
    for text in ("7,13,17,22.resid_post", "0-25.mlp_in", "1,2.mlp_out", "0,4-6,9.resid_mid"):
        assert str(Sites.parse(text)) == text
    assert len(Sites.parse("0-25.mlp_in")) == 26
    for text in (
        "x.mlp_in",
        "1-.mlp_in",
        "3.nothing",
        "",
        "5,3.mlp_in",
        "3-1.mlp_in",
        "1,1.mlp_in",
    ):
        with pytest.raises(InputError):
            Sites.parse(text)
