"""Edits as vectors in files: what they hold, who can read them, what cannot be one."""

import json
import random
import re
import struct
from contextlib import suppress
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gemscope import steering
from gemscope.errors import InputError
from gemscope.sites import Site
from gemscope.steering import (
    Change,
    Direction,
    Mode,
    Positions,
    Schedule,
    Steering,
    Strength,
    load_feature,
    load_vector,
    save_vector,
)

RESIDUAL = "miniature/resid_post_all/layer_{}_width_384_l0_small"
TRANSCODER = "miniature/transcoder_all/layer_2_width_192_l0_small"
HEADS = "miniature/attn_out_all/layer_4_width_128_l0_small"
CLT = "miniature/clt/width_384_l0_medium_affine"
TEXT = "def read(path):\n    return path.open()\n"


def feature(address, index=5, maximum=None):
    found = load_feature(f"{address}/{index}")
    return found if maximum is None else replace(found, maximum=maximum)


def change(what, strength="4", mode=Mode.ADD, **more):
    return Change(what=what, mode=mode, strength=Strength.parse(strength), **more)


def everywhere(what, strength="4", **more):
    return change(what, strength, positions=Positions(special=True), **more)


def steered(model, changes):
    return model.run(TEXT, edits=[Steering(changes)], logits=True).logits


def as_changes(directions, **more):
    return [change(d, "1", **more) for d in directions]


def bits(x):
    return x.contiguous().view(torch.int32)


CASES = {
    "a feature": lambda: [change(feature(RESIDUAL.format(3)))],
    "a share of the maximum": lambda: [change(feature(RESIDUAL.format(3), 9, 11.3), "0.3xmax")],
    "an amount": lambda: [change(feature(RESIDUAL.format(3)), "-2.7", amount=0.4)],
    "a transcoder": lambda: [change(feature(TRANSCODER))],
    "heads": lambda: [change(feature(HEADS))],
    "three layers": lambda: [change(feature(RESIDUAL.format(n)), "1.9") for n in (1, 3, 5)],
    "several sites": lambda: [change(feature(CLT, 200), "3")],
    "a direction": lambda: [
        change(Direction(torch.linspace(-1, 1, 256), Site.parse("2.resid_post")), "0.7")
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_steers_bit_for_bit_as_what_was_saved(name, miniature, tmp_path):
    changes = CASES[name]()
    found = load_vector(save_vector(changes, tmp_path / "made.safetensors"))
    expected = steered(miniature, changes)
    got = steered(miniature, as_changes(found))
    assert torch.equal(bits(got), bits(expected))
    plain = miniature.run(TEXT, logits=True).logits
    assert (expected - plain).abs().max() > 1e-3


def test_vectors_of_one_site_are_summed(miniature, tmp_path):
    features = [feature(RESIDUAL.format(3), i) for i in (1, 2, 3)]
    changes = [change(f, s) for f, s in zip(features, ("1.1", "-2.3", "0.7"), strict=True)]
    (found,) = load_vector(save_vector(changes, tmp_path / "made.safetensors"))
    parts = [
        f.rows[found.site].double() * s for f, s in zip(features, (1.1, -2.3, 0.7), strict=True)
    ]
    # Three strengths, three products and two sums, each rounded to float32.
    bound = 8 * 2.0**-24 * sum(part.abs() for part in parts)
    assert ((found.vector.double() - sum(parts)).abs() <= bound).all()
    # Sums may be taken in another order; what is left of that grows in later layers.
    expected, got = steered(miniature, changes), steered(miniature, as_changes([found]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_a_vector_file_is_plain_tensors_and_says_what_it_is(tmp_path):
    import gemscope

    changes = [change(feature(RESIDUAL.format(3), 9, 8.0), "0.5xmax", amount=0.5)]
    file = save_vector(changes, tmp_path / "made.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == ["3.resid_post"]
        vector, notes = opened.get_tensor("3.resid_post"), opened.metadata()
    assert vector.dtype == torch.float32
    assert torch.equal(vector, 2.0 * changes[0].what.rows[Site.parse("3.resid_post")])
    assert notes.pop("format") == "gemscope-vectors-1"
    told = {name: json.loads(value) for name, value in notes.items()}
    assert told == {
        "version": gemscope.__version__, "model": "gemscope/miniature", "special": False,
        "edits": [{
            "name": changes[0].what.name, "address": RESIDUAL.format(3), "feature": 9,
            "maximum": 8.0, "sites": ["3.resid_post"], "strength": "0.5xmax", "activation": 4.0,
            "amount": 0.5,
        }],
    }  # fmt: skip


# GGUF


def as_llama_cpp(file, d_model, n_layers):
    """What `common_control_vector_load_one` and `llama_adapter_cvec` make of a file: `[layer, d]`,
    to be added to what layer `il` gives out. There is no row for layer 0.
    """
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    added = np.zeros((n_layers, d_model), np.float32)
    for tensor in reader.tensors:
        stem, _, layer = tensor.name.partition(".")
        assert stem == "direction"
        assert int(layer) > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.shape == (d_model,)
        added[int(layer)] += tensor.data
    return torch.from_numpy(added), reader


def added_by_hand(model, added, text):
    """Logits of the plain model with a row of `added` added after each layer, at every token."""

    def adds(vector):
        def hook(_module, _args, out):
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        return hook

    hooks = [
        layer.register_forward_hook(adds(vector))
        for layer, vector in zip(model.stack.layers, added, strict=True)
        if vector.any()
    ]
    try:
        return model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def test_llama_cpp_would_add_what_is_steered_with(miniature, tmp_path):
    changes = [everywhere(feature(RESIDUAL.format(n)), "1.9") for n in (1, 3, 5)]
    file = save_vector(changes, tmp_path / "made.gguf")
    added, reader = as_llama_cpp(file, 256, miniature.n_layers)
    assert reader.get_field("controlvector.model_hint").contents() == "gemma3"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    told = json.loads(reader.get_field("gemscope.edits").contents())
    assert [one["sites"] for one in told] == [["1.resid_post"], ["3.resid_post"], ["5.resid_post"]]
    assert json.loads(reader.get_field("gemscope.model").contents()) == "gemscope/miniature"
    expected = steered(miniature, changes)
    assert torch.equal(bits(added_by_hand(miniature, added, TEXT)), bits(expected))
    back = as_changes(load_vector(file), positions=Positions(special=True))
    assert torch.equal(bits(steered(miniature, back)), bits(expected))


@pytest.mark.parametrize("written", ["3.mlp_out", "4.resid_pre", "3.resid_post"])
def test_streams_that_are_added_to_the_residual_stream(written, miniature, tmp_path):
    what = Direction(torch.linspace(-3, 2, 256), Site.parse(written))
    (found,) = load_vector(
        save_vector([everywhere(what)], tmp_path / "a.gguf", model="gemscope/miniature")
    )
    assert str(found.site) == "3.resid_post"
    got = steered(miniature, [everywhere(found, "1")])
    # What is added to the MLP's output is rounded once more, in the sum with the stream.
    torch.testing.assert_close(got, steered(miniature, [everywhere(what)]), rtol=0, atol=1e-3)


def test_layer_numbers_are_those_of_repeng(tmp_path):
    """A file as repeng's `export_gguf` writes it: `direction.N` is what decoder layer N gives out,
    layers counted from 0.
    """
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    file = tmp_path / "repeng.gguf"
    writer = gguf.GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", "gemma2")
    writer.add_uint32("controlvector.layer_count", 3)
    # Other keys, of every kind, are of no use and no harm.
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_float64("some.number", 3.5)
    writer.add_bool("some.flag", True)
    for layer, row in zip((7, 3, 12), rows, strict=True):
        writer.add_tensor(f"direction.{layer}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_vector(file)
    assert [str(d.site) for d in found] == ["3.resid_post", "7.resid_post", "12.resid_post"]
    for direction, row in zip(found, rows[[1, 0, 2]], strict=True):
        assert torch.equal(direction.vector, torch.from_numpy(row))


@pytest.mark.parametrize(
    ("what", "more", "why"),
    [
        (HEADS, {}, r"cannot hold what is added at 4\.attn_heads: .*layers 1 and up; write \.safe"),
        (RESIDUAL.format(0), {}, r"added at 0\.resid_post: .* llama\.cpp refuses layer 0"),
        (RESIDUAL.format(3), {"positions": Positions()}, "BOS and special tokens too, which these"),
    ],
)
def test_what_a_control_vector_cannot_hold(what, more, why, tmp_path):
    edit = everywhere(feature(what))
    file = tmp_path / "made.gguf"
    with pytest.raises(InputError, match=why):
        save_vector([replace(edit, **more)], file)
    assert not file.exists()
    with pytest.raises(InputError, match="what model it is for, and nobody has"):
        save_vector([everywhere(Direction(torch.ones(4), Site.parse("1.resid_post")))], file)


# What is no vector

MISFITS = {
    "set depends on what each token holds": {"mode": Mode.SET},
    "ablate depends on": {"mode": Mode.ABLATE, "strength": None},
    "0.1xnorm depends on what each token": {"strength": Strength.parse("0.1xnorm")},
    "2xcurrent depends on": {"strength": Strength.parse("2xcurrent")},
    "strength for each row of a batch, and a file has one": {"strength": Strength((1.0, 2.0))},
    r"for some positions only \(generated\)": {"positions": Positions.parse("generated")},
    r"for some positions only \(3:7\)": {"positions": Positions.parse("3:7")},
    "its schedule changes from token to token": {"schedule": Schedule(first=3)},
    "its schedule changes": {"schedule": Schedule(decay=0.5)},
    "keeping the norm depends on": {"keep_norm": True},
}


@pytest.mark.parametrize("why", MISFITS)
def test_edits_that_are_no_constant_addition_are_refused(why, tmp_path):
    edit = replace(change(feature(RESIDUAL.format(3), maximum=3.0)), **MISFITS[why])
    end = r".*what can be exported is mode add with a strength such as 4 or 0\.5xmax, at all posi"
    with pytest.raises(InputError, match=f"/5 is no constant vector: .*{why}{end}"):
        save_vector([edit], tmp_path / "made.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_things_that_are_no_vector(tmp_path):
    file = tmp_path / "made.safetensors"
    one = feature(RESIDUAL.format(3))
    of_another = replace(one, sae=replace(one.sae, origin=replace(one.sae.origin, model="b/c")))
    cases = [
        ([], "no edit to make a vector of"),
        ([change(one), change(of_another)], "belong to b/c and gemscope/miniature: export those"),
        ([change(one), everywhere(one)], "special tokens and some are not: export them apart"),
        ([change(one, "1e39")], r"the vector at 3\.resid_post is too large for float32"),
    ]
    for changes, why in cases:
        with pytest.raises(InputError, match=why):
            save_vector(changes, file)
    with pytest.raises(InputError, match=r"names no format: end it in \.safetensors or \.gguf"):
        save_vector([change(one)], tmp_path / "made.npz")
    with pytest.raises(InputError, match="there is no folder"):
        save_vector([change(one)], tmp_path / "none" / "made.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_over_only_by_force_and_never_half(tmp_path, monkeypatch):
    file = tmp_path / "made.safetensors"
    save_vector([change(feature(RESIDUAL.format(3)))], file)
    first = file.read_bytes()
    with pytest.raises(InputError, match="exists; choose another name"):
        save_vector([change(feature(RESIDUAL.format(2)))], file)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fail)
        with pytest.raises(InputError, match="cannot be written: No space left"):
            save_vector([change(feature(RESIDUAL.format(2)))], file, force=True)
    assert file.read_bytes() == first
    save_vector([change(feature(RESIDUAL.format(2)))], file, force=True)
    assert str(load_vector(file)[0].site) == "2.resid_post"


# Files of others


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


ROW = struct.pack("<3f", 1, 2, 3)


def by_hand(*, magic=b"GGUF", version=3, architecture="controlvector", name="direction.2",
            shape=(3,), kind=0, offset=0, count=1, keys=1, data=ROW):  # fmt: skip
    """A control vector, byte by byte."""
    head = struct.pack("<4sIQQ", magic, version, count, keys)
    head += string("general.architecture") + struct.pack("<I", 8) + string(architecture)
    head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    head += struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32) + data


DAMAGED = {
    "is not a GGUF file": {"magic": b"GGML"},
    "version 1; versions 2 and 3": {"version": 1},
    "version 50331648; versions 2 and 3 are read, little-endian": {"version": 0x03000000},
    "holds 'llama', not a control vector": {"architecture": "llama"},
    r"a tensor 'direction\.x'": {"name": "direction.x"},
    r"direction\.2 of .* is not one row of float32": {"kind": 1},
    "is not one row of float32 numbers": {"shape": (3, 1)},
    "is not one row": {"shape": (0,)},
    "cut short or damaged": {"shape": (2**61,)},
    "short or damaged": {"offset": 2**63},
    "or damaged": {"count": 2**60},
    "damaged: get": {"keys": 2**63},
    "get the file again": {"shape": (3,) * 5},
    "holds no vector": {"count": 0},
    "not of finite numbers": {"data": struct.pack("<3f", 1, float("nan"), 3)},
}


@pytest.mark.parametrize("why", DAMAGED)
def test_control_vectors_that_are_none(why, file):
    with pytest.raises(InputError, match=why):
        load_vector(file(by_hand(**DAMAGED[why]), "a.gguf"))


def test_a_control_vector_made_by_hand(file):
    (found,) = load_vector(file(by_hand(), "a.gguf"))
    assert (str(found.site), found.vector.tolist()) == ("2.resid_post", [1.0, 2.0, 3.0])


def test_cut_and_changed_files_are_refused_in_a_sentence(tmp_path, file):
    whole = by_hand()
    for end in range(len(whole)):
        with pytest.raises(InputError, match=r"a\.gguf "):
            load_vector(file(whole[:end], "a.gguf"))
    made = save_vector([change(feature(RESIDUAL.format(3)))], tmp_path / "made.safetensors")
    draw = random.Random(0)
    for raw, name in ((whole, "a.gguf"), (made.read_bytes(), "a.safetensors")):
        for _ in range(300):
            hurt = bytearray(raw)
            hurt[draw.randrange(min(len(hurt), 900))] = draw.randrange(256)
            # Bytes of a note or a number may change unnoticed: nothing else comes out of it.
            with suppress(InputError):
                load_vector(file(bytes(hurt), name))


def test_files_that_hold_no_vectors(tmp_path, file):
    cases = {
        "no site: those of a steering vector": {"layer_3": torch.ones(4)},
        r"F64 of shape \[4\], not one vector": {"3.resid_post": torch.ones(4).double()},
        r"F32 of shape \[2, 2\]": {"3.resid_post": torch.ones(2, 2)},
        "holds no vector": {},
        r"vector at 3\.resid_post .* finite": {"3.resid_post": torch.tensor([1.0, torch.inf])},
    }
    made = tmp_path / "other.safetensors"
    for why, tensors in cases.items():
        save_file(tensors, made)
        with pytest.raises(InputError, match=why):
            load_vector(made)
    with pytest.raises(InputError, match=r"x\.pt names no format: vectors end in"):
        load_vector("x.pt")
    with pytest.raises(InputError, match=r"none\.gguf cannot be read: No such file"):
        load_vector(tmp_path / "none.gguf")
    with made.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(InputError, match="no file of at most 256 MiB"):
        load_vector(made)


# The command


def test_the_command(command, indexed, small_store, tmp_path):
    file = tmp_path / "made.gguf"
    store = ("--store", small_store)
    code, out, _ = command("vector", f"{indexed[1]}/17", "--strength", "0.5xmax", "--to", file,
                           "--feature", f"{indexed[0]}/3", "--json", *store)  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert told["file"] == str(file)
    assert {row["site"] for row in told["vectors"]} == {"2.resid_post", "3.resid_post"}
    for row, direction in zip(
        sorted(told["vectors"], key=lambda r: r["site"]), load_vector(file), strict=True
    ):
        assert row["norm"] == pytest.approx(direction.vector.norm().item(), rel=1e-6)
    code, out, _ = command("vector", f"{indexed[1]}/17", "--strength", "4", "--to", file, "--force")
    assert code == 0
    assert "3.resid_post: 256 numbers, norm " in out
    assert re.search(r"layer 3; readers add it at BOS too", out)


def test_commands_that_are_refused(refused, indexed, small_store, tmp_path):
    file, name = tmp_path / "made.gguf", f"{indexed[0]}/3"
    refused("vector", name, "--strength", "4", "--to", "a.pt", match="names no format: end it in")
    refused("vector", name, "--strength", "4x", "--to", file, match="4x")
    refused("vector", indexed[0], "--strength", "4", "--to", file, match="names no feature")
    refused("vector", f"{indexed[0]}/384", "--strength", "4", "--to", file, match="0 to 383")
    refused("vector", name, "--strength", "1xnorm", "--to", file, match="1xnorm depends on what")
    refused("vector", name, "--strength", "1", "--strength", "2", "--to", file,
            match="2 strengths for 1 features")  # fmt: skip
    refused("vector", f"{HEADS}/3", "--strength", "1xmax", "--to", file, "--store", small_store,
            match=HEADS)  # fmt: skip
    assert not file.exists()
    file.write_text("mine")
    refused("vector", name, "--strength", "4", "--to", file, match="write over it with --force")
    assert file.read_text() == "mine"


def test_the_layer_shows_what_vectors_need():
    for name in ("check_target", "control_layer", "load_vector", "save_vector", "vectors_of"):
        assert hasattr(steering, name)
