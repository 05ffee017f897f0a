"""Gemma Scope 2's files: written and read exactly, and refused with a reason when damaged."""

import json
import math
import struct
from dataclasses import asdict

import pytest
import torch
from handmade import (
    CONFIG,
    D_OUT,
    D_SAE,
    DTYPES,
    SKIP,
    VALUES,
    drawn,
    facts,
    made,
    place,
    same,
    whole,
)

from gemscope import formats
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_exactly(tmp_path, generator, dtype, affine):
    writes = {"type": "transcoder", "hf_hook_point_out": "model.layers.2.output"} if affine else {}
    config = facts(affine_connection=affine, **writes)
    tensors = drawn(generator, dtype, affine=affine)
    formats.write(tmp_path / "new" / "a", config, tensors)
    read_config, read = formats.read(tmp_path / "new" / "a")
    assert read_config == config
    assert same(read, tensors)
    assert json.loads((tmp_path / "new" / "a" / "config.json").read_text()) == asdict(config)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a"]


def test_the_type_must_fit_the_hooks(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    for wrong in ({"type": "transcoder"}, {"hf_hook_point_out": "model.layers.2.output"}):
        with pytest.raises(InputError, match="an sae writes where it reads, a transcoder not"):
            formats.write(tmp_path / "a", facts(**wrong), tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_transposed_view_is_written_by_its_values(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    formats.write(tmp_path / "a", facts(), tensors | {"w_enc": tensors["w_enc"].T.clone().T})
    assert same(formats.read(tmp_path / "a")[1], tensors)


def test_a_written_folder_is_readable_by_others(tmp_path, generator):
    formats.write(tmp_path / "a", facts(), drawn(generator, torch.float32, affine=False))
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in (tmp_path / "a").iterdir())


def test_write_leaves_an_existing_folder_alone(tmp_path, generator):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists; choose another folder"):
        formats.write(tmp_path / "a", facts(), drawn(generator, torch.float32, affine=False))
    assert [f.name for f in tmp_path.rglob("*")] == ["a", "mine"]


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        ({}, {"b_enc": torch.zeros(D_SAE + 1)}, "b_enc is"),
        ({"width": D_SAE + 1}, {}, "says width"),
        ({"affine_connection": True}, {}, "has no affine_skip_connection"),
        ({}, {"w_dec": torch.full((D_SAE, D_OUT), math.nan)}, "w_dec holds NaN"),
        ({}, {"threshold": torch.full((D_SAE,), -1.0)}, "negative"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, generator, config, tensors, match):
    with pytest.raises(InputError, match=match):
        formats.write(
            tmp_path / "a",
            facts(**config),
            drawn(generator, torch.float32, affine=False) | tensors,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path, generator):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/a cannot be written"):
        formats.write(
            tmp_path / "file" / "a", facts(), drawn(generator, torch.float32, affine=False)
        )


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_file_made_by_hand_is_read_right(tmp_path, dtype):
    header, data = made(dtype=dtype)
    folder = place(tmp_path / "a", whole({"__metadata__": {"by": "hand"}} | header, data))
    config, tensors = formats.read(folder)
    assert asdict(config) == CONFIG
    wanted = {n: torch.tensor(v).reshape(s).to(DTYPES[dtype]) for n, (s, v) in VALUES.items()}
    assert same(tensors, wanted)
    assert formats.read_shapes(folder) == {
        n: formats.TensorInfo(dtype, tuple(s)) for n, (s, _) in VALUES.items()
    }


def test_a_file_cut_anywhere_is_refused(tmp_path):
    folder, sound = place(tmp_path / "a"), whole(*made())
    for length in range(len(sound)):
        (folder / "params.safetensors").write_bytes(sound[:length])
        with pytest.raises(InputError, match="cut short"):
            formats.read(folder)


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    folder = place(tmp_path / "a", struct.pack("<Q", length) + whole(*made())[8:])
    with pytest.raises(InputError, match="not a safetensors file, or it is cut short"):
        formats.read(folder)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    folder = place(tmp_path / "a", whole(*made()) + b"\0")
    with pytest.raises(InputError, match="where its header promises"):
        formats.read(folder)


def test_a_header_that_claims_a_terabyte_is_refused_at_once(tmp_path):
    header, data = made()
    last = max(header, key=lambda n: header[n]["data_offsets"])
    begin, _ = header[last]["data_offsets"]
    header[last] |= {"shape": [2**38], "data_offsets": [begin, begin + 2**40]}
    with pytest.raises(InputError, match=r"its header promises 10995\d{8}: it is cut short"):
        formats.read(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON at all",
        b"[]",
        b"77",
        b"[" * 50_000,
        json.dumps(made()[0]).encode("utf-16"),
        b'{"w_enc": 5}',
        b'{"w_enc": [1, 2]}',
        b'{"w_enc": {"dtype": "F32", "shape": [1]}}',
    ],
    ids=["text", "list", "number", "deep", "utf-16", "scalar", "array", "no offsets"],
)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    with pytest.raises(InputError, match=r"the header of .* cannot be read"):
        formats.read(place(tmp_path / "a", whole(header, made()[1])))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4]},
        {"shape": [True, 3]},
        {"shape": [3.0]},
        {"shape": ["3"]},
        {"shape": None},
        {"data_offsets": [0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [-12, 0]},
        {"data_offsets": [12, 0]},
        {"data_offsets": ["0", "12"]},
        {"dtype": "F128"},
        {"dtype": ["F32"]},
    ],
)
def test_a_tensor_that_is_not_its_bytes_is_refused(tmp_path, change):
    header, data = made()
    header["b_enc"] |= change
    with pytest.raises(InputError, match=r"the header of .* cannot be read"):
        formats.read(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize("shift", [-12, -4, 4, 12])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path, shift):
    header, data = made()
    offsets = header["threshold"]["data_offsets"]
    header["threshold"]["data_offsets"] = [n + shift for n in offsets]
    with pytest.raises(InputError, match="overlap or leave gaps"):
        formats.read(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize("name", list(VALUES))
def test_a_missing_tensor_is_named(tmp_path, name):
    header, data = made({n: v for n, v in VALUES.items() if n != name})
    with pytest.raises(InputError, match=f"lacks {name}; it has"):
        formats.read(place(tmp_path / "a", whole(header, data)))


def test_an_unknown_tensor_is_named_with_the_nearest_known(tmp_path):
    header, data = made(VALUES | {"thresholds": ([3], [0.0, 0.0, 0.0])})
    with pytest.raises(InputError, match="unknown tensor 'thresholds'; nearest: threshold"):
        formats.read(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("b_enc", [2], r"b_enc is \[2\] .* ask for \[3\]"),
        ("threshold", [4], r"threshold is \[4\] .* ask for \[3\]"),
        ("b_dec", [3], r"b_dec is \[3\] .* ask for \[2\]"),
        ("w_dec", [2, 3], r"w_dec is \[2, 3\] .* ask for \[3, 3\]"),
        ("w_enc", [3, 2], r"is \[.*\] where w_enc \[3, 2\]"),
        ("w_enc", [6], r"w_enc has shape \[6\]"),
        ("b_dec", [1, 2], r"b_dec has shape \[1, 2\]"),
        ("threshold", [], r"threshold has shape \[\]"),
    ],
)
def test_shapes_that_contradict_each_other_are_told(tmp_path, name, shape, match):
    header, data = made(VALUES | {name: (shape, [0.0] * math.prod(shape))})
    with pytest.raises(InputError, match=match):
        formats.read(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize(("dtype", "size"), [("I32", 4), ("U8", 1), ("F64", 8)])
def test_weights_of_another_type_are_refused(tmp_path, dtype, size):
    header, data = made({n: v for n, v in VALUES.items() if n != "b_enc"})
    offsets = [len(data), len(data) + 3 * size]
    header["b_enc"] = {"dtype": dtype, "shape": [3], "data_offsets": offsets}
    with pytest.raises(InputError, match=f"b_enc is {dtype}, not F32, BF16 or F16"):
        formats.read(place(tmp_path / "a", whole(header, data + bytes(3 * size))))


def test_a_width_that_is_not_the_weights_is_refused(tmp_path):
    folder = place(tmp_path / "a", config=CONFIG | {"width": 4})
    with pytest.raises(InputError, match="says width 4, the weights are 3 wide"):
        formats.read(folder)


@pytest.mark.parametrize("claimed", [False, True])
def test_a_skip_connection_is_there_exactly_when_claimed(tmp_path, claimed):
    values = VALUES if claimed else VALUES | {SKIP: ([2, 2], [1.0, 2.0, 3.0, 4.0])}
    folder = place(tmp_path / "a", whole(*made(values)), CONFIG | {"affine_connection": claimed})
    has = "has no" if claimed else "has"
    with pytest.raises(InputError, match=f"affine_connection {claimed}, .* {has} {SKIP}"):
        formats.read(folder)


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, number):
    shape, numbers = VALUES[name]
    values = VALUES | {name: (shape, [*numbers[:-1], number])}
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        formats.read(place(tmp_path / "a", whole(*made(values))))


def test_a_negative_threshold_is_refused(tmp_path):
    values = VALUES | {"threshold": ([3], [1.0, -0.001, 1.0])}
    with pytest.raises(InputError, match="threshold has negative entries"):
        formats.read(place(tmp_path / "a", whole(*made(values))))


@pytest.mark.parametrize("name", ["config.json", "params.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = place(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        formats.read(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 50_000, "cannot be read as JSON"),
        (b"[]", "holds list, not an object"),
        (b"null", "holds NoneType, not an object"),
        (b"{}", "lacks affine_connection, architecture, .*, width"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(tmp_path, text, match):
    folder = place(tmp_path / "a")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=match):
        formats.read_config(folder)


@pytest.mark.parametrize("name", list(CONFIG))
def test_a_missing_key_is_named(tmp_path, name):
    config = {n: v for n, v in CONFIG.items() if n != name}
    with pytest.raises(InputError, match=f"lacks {name}$"):
        formats.read_config(place(tmp_path / "a", config=config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": "3"}, "width is '3', not int"),
        ({"width": 3.0}, "width is 3.0, not int"),
        ({"width": True}, "width is True, not int"),
        ({"width": False}, "width is False, not int"),
        ({"width": None}, "width is None, not int"),
        ({"l0": "2"}, "l0 is '2', not float"),
        ({"l0": True}, "l0 is True, not float"),
        ({"l0": False}, "l0 is False, not float"),
        ({"l0": [2]}, r"l0 is \[2\], not float"),
        ({"l0": 0}, "l0 is 0, not between 0 and width 3"),
        ({"l0": -1.0}, "l0 is -1.0, not between"),
        ({"l0": 4}, "l0 is 4, not between"),
        ({"l0": math.nan}, "l0 is nan, not between"),
        ({"l0": math.inf}, "l0 is inf, not between"),
        ({"affine_connection": 0}, "affine_connection is 0, not bool"),
        ({"affine_connection": "false"}, "affine_connection is 'false', not bool"),
        ({"model_name": 3}, "model_name is 3, not str"),
        ({"model_name": None}, "model_name is None, not str"),
        ({"hf_hook_point_in": ["x"]}, "hf_hook_point_in is .*, not str"),
        ({"type": "crosscoder"}, "type 'crosscoder' is not one of sae, transcoder"),
        ({"architecture": "topk"}, "architecture 'topk' is not jump_relu"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, change, match):
    with pytest.raises(InputError, match=match):
        formats.read_config(place(tmp_path / "a", config=CONFIG | change))


def test_a_whole_number_serves_as_l0_and_other_keys_are_left_out(tmp_path):
    folder = place(tmp_path / "a", config=CONFIG | {"l0": 2, "note": "hello"})
    config = formats.read_config(folder)
    assert asdict(config) == CONFIG
    assert type(config.l0) is float


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gemma-v3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-v3-27b-it", "google/gemma-3-27b-it"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("google/gemma-3-12b-pt", "google/gemma-3-12b-pt"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("gemma-v3-270m-it", "google/gemma-3-270m-it"),
        ("someone/my-gemma-3-1b-pt", "someone/my-gemma-3-1b-pt"),
    ],
)
def test_the_model_is_called_by_its_name_on_the_hub(tmp_path, written, meant):
    folder = place(tmp_path / "a", config=CONFIG | {"model_name": written})
    assert formats.read_config(folder).model_name == meant
