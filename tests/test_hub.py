"""Addresses and folders: the catalog says what the files say, and a copy is the same artefact."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemscope import formats, hub
from gemscope.errors import InputError
from gemscope.hub import build, catalog, digest, load_sae, locate, model_source, published
from gemscope.sae import JumpReLU
from gemscope.sites import each

ROW = [
    "address", "kind", "reads", "writes", "d_in", "d_out", "d_sae", "l0", "affine", "model",
    "canonical",
]  # fmt: skip
PUBLISHED = json.loads((Path(hub.__file__).parent / "published.json").read_text("utf-8"))


@pytest.fixture
def copied(tmp_path):
    """A copy of an artefact's folder."""

    def make(entry):
        return Path(shutil.copytree(entry.path, tmp_path / "copy" / entry.path.name))

    return make


@pytest.fixture
def small(tmp_path):
    """The folder of a tiny dictionary, at a path below a temporary one and of a given model."""

    def make(path, model):
        config = formats.Config(
            hf_hook_point_in="model.layers.1.pre_feedforward_layernorm.output",
            hf_hook_point_out="model.layers.1.post_feedforward_layernorm.output",
            width=4,
            model_name=model,
            architecture="jump_relu",
            l0=2.0,
            affine_connection=True,
            type="transcoder",
        )
        part = formats.Part(
            w_enc=torch.ones(2, 4),
            b_enc=torch.zeros(4),
            w_dec=torch.ones(4, 3),
            b_dec=torch.zeros(3),
            threshold=torch.ones(4),
            skip=torch.ones(2, 3),
        )
        formats.write_gemma_scope_2(tmp_path / path, config, [part])
        return str(tmp_path / path)

    return make


def test_rows_have_the_fixed_keys(entries):
    assert entries
    assert all(list(entry.row()) == ROW for entry in entries)
    plain = (str, int, float, bool)
    assert all(type(v) in plain for entry in entries for v in entry.row().values())


def test_addresses_are_unique_and_found(entries):
    assert len({e.address for e in entries}) == len(entries)
    assert [locate(e.address) for e in entries] == entries


def test_an_address_says_where_the_files_are(entries):
    for entry in entries:
        release, suite = entry.address.split("/", 1)
        assert release == "miniature"
        assert entry.path.as_posix().endswith("/" + suite)


def test_an_entry_says_what_the_files_say(entries):
    for entry in entries:
        parts, config = formats.read(entry.path), formats.read_config(entry.path)
        for part in parts:
            assert part.w_enc.shape == (entry.d_in, entry.d_sae // len(parts))
            assert part.w_dec.shape[0] == entry.d_sae // len(parts)
            assert part.w_dec.shape[-1] == entry.d_out
            assert str(part.w_enc.dtype) == f"torch.{entry.dtype}"
            assert (part.skip is not None) == entry.affine
        assert (config.type, config.l0, config.model_name) == (entry.kind, entry.l0, entry.model)
        assert (entry.kind in ("sae", "crosscoder")) == (entry.reads == entry.writes)


def test_the_catalog_is_ordered_and_chosen_by_words(entries):
    assert entries == sorted(entries, key=lambda e: (each(e.reads), e.address))
    for entry in entries[::11]:
        assert entry in catalog(entry.address.upper())
        assert entry in catalog(f"{entry.kind} {entry.address[-5:]}")
    assert catalog("miniature") == entries
    assert catalog()[: len(entries)] == entries
    assert catalog("sae no-such-word") == []


def test_a_copied_folder_has_the_facts_of_its_address(entries, tmp_path):
    for number, entry in enumerate(entries):
        folder = tmp_path / str(number)
        shutil.copytree(entry.path, folder)
        assert locate(str(folder)) == dataclasses.replace(
            entry, address=str(folder), licence=None, path=folder.resolve()
        )


def test_a_folder_may_be_written_in_several_ways(entries, copied, monkeypatch):
    folder = copied(entries[0])
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for text in (folder.name, f"./{folder.name}/", f"~/{folder.name}"):
        assert locate(text).path == folder.resolve()


def test_an_unknown_address_names_the_nearest(entries):
    for entry in entries:
        with pytest.raises(InputError, match=f"nearest: {entry.address}"):
            locate(entry.address + "x")


def test_a_folder_loads_as_its_address_does(entries, copied):
    entry = entries[0]
    here, there = load_sae(entry.address), load_sae(str(copied(entry)))
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    assert torch.equal(here.activation.threshold, there.activation.threshold)
    assert (here.reads, here.writes) == (there.reads, there.writes)
    assert there.origin == dataclasses.replace(
        here.origin, address=there.origin.address, licence=None
    )
    parameters = (entry.path / "params.safetensors").read_bytes()
    assert digest(locate(there.origin.address)) == hashlib.sha256(parameters).hexdigest()


def test_every_artefact_loads_with_the_weights_of_its_file(entries):
    for entry in entries:
        if entry.kind not in ("sae", "transcoder"):
            continue
        (part,) = formats.read(entry.path)
        sae = build(entry)
        assert torch.equal(sae.w_enc, part.w_enc)
        assert torch.equal(sae.w_dec, part.w_dec)
        assert torch.equal(sae.b_enc, part.b_enc)
        assert torch.equal(sae.b_dec, part.b_dec)
        assert isinstance(sae.activation, JumpReLU)
        assert torch.equal(sae.activation.threshold, part.threshold.float())
        assert (sae.skip is not None) == entry.affine
        assert (sae.reads, sae.writes) == (entry.reads, entry.writes)
        assert (sae.origin.model, sae.origin.l0) == (entry.model, entry.l0)


def test_a_transcoder_of_unlike_widths_is_told_apart(small):
    entry = locate(small("a", "some/model"))
    assert (str(entry.reads), str(entry.writes)) == ("1.mlp_in", "1.mlp_out")
    assert (entry.d_in, entry.d_sae, entry.d_out) == (2, 4, 3)
    assert (entry.kind, entry.affine, entry.dtype) == ("transcoder", True, "float32")
    assert torch.equal(build(entry).skip, torch.ones(2, 3))


@pytest.mark.parametrize("known", PUBLISHED, ids=lambda known: known["address"])
def test_published_figures_belong_to_a_model_and_a_path(small, known):
    suite = known["address"].split("/", 1)[1]
    group, name = suite.split("/")
    assert published(locate(small(f"a/{suite}", known["model"]))) == known
    assert published(locate(small(f"b/{suite}", "some/other"))) is None
    assert published(locate(small(f"c/{name}", known["model"]))) is None
    assert published(locate(small(f"d/x{suite}", known["model"]))) is None
    assert published(locate(small(f"e/{group}/{name}x", known["model"]))) is None
    assert published(locate(small(f"f/{suite}/copy", known["model"]))) is None


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["info", "ADDRESS"]])
def test_listing_does_without_torch(entries, command):
    arguments = [a.replace("ADDRESS", entries[0].address) for a in command]
    code = (
        "import sys; from gemscope.cli import main; "
        f"assert main({arguments!r}) == 0; "
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_miniature_is_a_folder_and_any_other_name_is_itself(entries):
    assert Path(model_source("miniature"), "config.json").is_file()
    assert {model_source(e.model) for e in entries} == {model_source("miniature")}
    assert model_source("google/gemma-3-1b-pt") == "google/gemma-3-1b-pt"


@pytest.mark.parametrize("kind", ["crosscoder", "clt"])
def test_every_multi_layer_artefact_does_so_too(entries, kind):
    (entry,) = (e for e in entries if e.kind == kind)
    model = build(entry)
    for layer, part in zip(model.layers, formats.read(entry.path), strict=True):
        assert torch.equal(layer.w_enc, part.w_enc)
        assert torch.equal(layer.w_dec, part.w_dec)
        assert torch.equal(layer.threshold, part.threshold.float())
        assert (layer.skip is not None) == entry.affine
    assert (model.reads, model.writes) == (entry.reads, entry.writes)
