"""Gemma Scope 2's files of one layer: written and read exactly, and refused with a reason."""

import json
import math
import struct
import time
from dataclasses import asdict, replace

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
    meant,
    only,
    part_of,
    place,
    same,
    whole,
)

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site, Stream

pytestmark = pytest.mark.usefixtures("unchecked")

SITE = Site(1, Stream.RESID_POST)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_exactly(tmp_path, generator, dtype, affine):
    writes = {"type": "transcoder", "hf_hook_point_out": "model.layers.2.output"} if affine else {}
    config = facts(affine_connection=affine, **writes)
    tensors = drawn(generator, dtype, affine=affine)
    formats.write_gemma_scope_2(tmp_path / "new" / "a", config, [part_of(tensors)])
    assert formats.read_config(tmp_path / "new" / "a") == config
    assert same(only(tmp_path / "new" / "a"), tensors)
    assert json.loads((tmp_path / "new" / "a" / "config.json").read_text()) == asdict(config)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a"]


def test_the_type_must_fit_the_hooks(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    for wrong in ({"type": "transcoder"}, {"hf_hook_point_out": "model.layers.2.output"}):
        with pytest.raises(
            InputError, match="an sae or crosscoder writes where it reads, a transcoder"
        ):
            formats.write_gemma_scope_2(tmp_path / "a", facts(**wrong), [part_of(tensors)])
    assert list(tmp_path.iterdir()) == []


def test_a_transposed_view_is_written_by_its_values(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    turned = part_of(tensors | {"w_enc": tensors["w_enc"].T.clone().T})
    formats.write_gemma_scope_2(tmp_path / "a", facts(), [turned])
    assert same(only(tmp_path / "a"), tensors)


def test_tensors_that_share_memory_are_written(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    tied = part_of(tensors | {"threshold": tensors["b_enc"].abs_()})
    formats.write_gemma_scope_2(tmp_path / "a", facts(), [tied])
    assert torch.equal(only(tmp_path / "a")["threshold"], tensors["b_enc"])
    assert torch.equal(only(tmp_path / "a")["b_enc"], tensors["b_enc"])


def test_a_dictionary_without_thresholds_is_not_written(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False) | {"threshold": None}
    with pytest.raises(InputError, match="holds JumpReLU dictionaries only"):
        formats.write_gemma_scope_2(tmp_path / "a", facts(), [part_of(tensors)])
    assert list(tmp_path.iterdir()) == []


def test_a_written_folder_is_readable_by_others(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    formats.write_gemma_scope_2(tmp_path / "a", facts(), [part_of(tensors)])
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in (tmp_path / "a").iterdir())


def test_write_leaves_an_existing_folder_alone(tmp_path, generator):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    part = part_of(drawn(generator, torch.float32, affine=False))
    with pytest.raises(InputError, match="exists; choose another folder"):
        formats.write_gemma_scope_2(tmp_path / "a", facts(), [part])
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
    part = part_of(drawn(generator, torch.float32, affine=False) | tensors)
    with pytest.raises(InputError, match=match) as refused:
        formats.write_gemma_scope_2(tmp_path / "a", facts(**config), [part])
    # What is told is the folder that was asked for, not the one it was prepared in.
    assert str(tmp_path / "a") in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path, generator):
    (tmp_path / "file").write_text("")
    part = part_of(drawn(generator, torch.float32, affine=False))
    with pytest.raises(InputError, match="file/a cannot be written"):
        formats.write_gemma_scope_2(tmp_path / "file" / "a", facts(), [part])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_file_made_by_hand_is_read_right(tmp_path, dtype):
    header, data = made(dtype=dtype)
    folder = place(tmp_path / "a", whole({"__metadata__": {"by": "hand"}} | header, data))
    assert asdict(formats.read_config(folder)) == CONFIG
    assert same(only(folder), meant(dtype=DTYPES[dtype]))
    said = formats.inspect(folder)
    assert said == formats.Facts(
        layout="gemma-scope-2",
        kind="sae",
        d_in=2,
        d_sae=3,
        d_out=2,
        affine=False,
        activation="jumprelu",
        dtype={"F32": "float32", "BF16": "bfloat16"}[dtype],
        files=(folder / "params.safetensors",),
        shapes={n: tuple(s) for n, (s, _) in VALUES.items()},
        reads=SITE,
        writes=SITE,
        model="some/model",
        l0=2.0,
    )
    assert formats.read_header(folder / "params.safetensors") == {
        n: formats.TensorInfo(dtype, tuple(s)) for n, (s, _) in VALUES.items()
    }


def test_a_folder_without_a_config_is_read_and_says_less(tmp_path):
    folder = place(tmp_path / "a")
    before = formats.inspect(folder)
    (folder / "config.json").unlink()
    assert same(only(folder), meant())
    unknown = {"kind": None, "reads": None, "writes": None, "model": None, "l0": None}
    assert formats.inspect(folder) == replace(before, **unknown)


def test_a_skip_connection_is_read(tmp_path):
    values = VALUES | {SKIP: ([2, 2], [1.0, 2.0, 3.0, 4.0])}
    config = CONFIG | {
        "affine_connection": True, "type": "transcoder",
        "hf_hook_point_out": "model.layers.2.output",
    }  # fmt: skip
    folder = place(tmp_path / "a", whole(*made(values)), config)
    assert same(only(folder), meant(values))
    said = formats.inspect(folder)
    assert (said.affine, said.kind) == (True, "transcoder")
    assert (said.reads, said.writes) == (SITE, Site(2, Stream.RESID_POST))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    folder, sound = place(tmp_path / "a"), whole(*made())
    for length in range(len(sound)):
        (folder / "params.safetensors").write_bytes(sound[:length])
        with pytest.raises(InputError, match="cut short"):
            only(folder)


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    folder = place(tmp_path / "a", struct.pack("<Q", length) + whole(*made())[8:])
    with pytest.raises(InputError, match="not a safetensors file, or it is cut short"):
        only(folder)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    folder = place(tmp_path / "a", whole(*made()) + b"\0")
    with pytest.raises(InputError, match="where its header promises"):
        only(folder)


def test_a_header_that_claims_a_terabyte_is_refused_at_once(tmp_path):
    header, data = made()
    last = max(header, key=lambda n: header[n]["data_offsets"])
    begin, _ = header[last]["data_offsets"]
    header[last] |= {"shape": [2**38], "data_offsets": [begin, begin + 2**40]}
    with pytest.raises(InputError, match=r"its header promises 10995\d{8}: it is cut short"):
        only(place(tmp_path / "a", whole(header, data)))


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
        json.dumps(made()[0]).encode().replace(b"b_dec", b"b_enc"),
        json.dumps(made()[0]).encode().replace(b"b_dec", b"b\\ndec"),
        json.dumps(made()[0]).encode().replace(b"b_dec", b"b\\ud800dec"),
        json.dumps(made()[0]).encode().replace(b"b_dec", b"b" * 1_000),
    ],
    ids=["text", "list", "number", "deep", "utf-16", "scalar", "array", "no offsets",
         "a name twice", "a line break", "half a character", "a long name"],
)  # fmt: skip
def test_a_header_of_another_form_is_refused(tmp_path, header):
    with pytest.raises(InputError, match=r"the header of .* cannot be read"):
        only(place(tmp_path / "a", whole(header, made()[1])))


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
        only(place(tmp_path / "a", whole(header, data)))


def test_a_shape_that_takes_for_ever_to_multiply_is_refused_at_once(tmp_path):
    header, data = made()
    header["b_enc"]["shape"] = [10**4_000] * 900
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"the header of .* cannot be read"):
        only(place(tmp_path / "a", whole(header, data)))
    # Multiplied out, it takes half a minute.
    assert time.perf_counter() - began < 5


def test_a_header_larger_than_any_dictionary_has_is_refused(tmp_path):
    header, data = made()
    header["__metadata__"] = {"note": "x" * 2**22}
    with pytest.raises(InputError, match="not a safetensors file, or it is cut short"):
        only(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize("shift", [-12, -4, 4, 12])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path, shift):
    header, data = made()
    offsets = header["threshold"]["data_offsets"]
    header["threshold"]["data_offsets"] = [n + shift for n in offsets]
    with pytest.raises(InputError, match="overlap or leave gaps"):
        only(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize("name", list(VALUES))
def test_a_missing_tensor_is_named(tmp_path, name):
    header, data = made({n: v for n, v in VALUES.items() if n != name})
    with pytest.raises(InputError, match=f"lacks {name}; it has"):
        only(place(tmp_path / "a", whole(header, data)))


def test_an_unknown_tensor_is_named_with_the_nearest_known(tmp_path):
    header, data = made(VALUES | {"thresholds": ([3], [0.0, 0.0, 0.0])})
    with pytest.raises(InputError, match="unknown tensor 'thresholds'; nearest: threshold"):
        only(place(tmp_path / "a", whole(header, data)))


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
        only(place(tmp_path / "a", whole(header, data)))


@pytest.mark.parametrize(("dtype", "size"), [("I32", 4), ("U8", 1), ("F64", 8)])
def test_weights_of_another_type_are_refused(tmp_path, dtype, size):
    header, data = made({n: v for n, v in VALUES.items() if n != "b_enc"})
    offsets = [len(data), len(data) + 3 * size]
    header["b_enc"] = {"dtype": dtype, "shape": [3], "data_offsets": offsets}
    with pytest.raises(InputError, match=f"b_enc is {dtype}, not F32, BF16 or F16"):
        only(place(tmp_path / "a", whole(header, data + bytes(3 * size))))


def test_a_width_that_is_not_the_weights_is_refused(tmp_path):
    folder = place(tmp_path / "a", config=CONFIG | {"width": 4})
    with pytest.raises(InputError, match="says width 4, the weights are 3 wide"):
        only(folder)


@pytest.mark.parametrize("claimed", [False, True])
def test_a_skip_connection_is_there_exactly_when_claimed(tmp_path, claimed):
    values = VALUES if claimed else VALUES | {SKIP: ([2, 2], [1.0, 2.0, 3.0, 4.0])}
    folder = place(tmp_path / "a", whole(*made(values)), CONFIG | {"affine_connection": claimed})
    has = "has no" if claimed else "has"
    with pytest.raises(InputError, match=f"affine_connection {claimed}, .* {has} {SKIP}"):
        only(folder)


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, number):
    shape, numbers = VALUES[name]
    values = VALUES | {name: (shape, [*numbers[:-1], number])}
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        only(place(tmp_path / "a", whole(*made(values))))


def test_numbers_as_large_as_they_come_are_read(tmp_path):
    largest = 3.4028234663852886e38
    values = VALUES | {"w_enc": ([2, 3], [largest, -largest, 1.0, 2.0, 3.0, 1e-45])}
    assert same(only(place(tmp_path / "a", whole(*made(values)))), meant(values))


def test_a_negative_threshold_is_refused(tmp_path):
    values = VALUES | {"threshold": ([3], [1.0, -0.001, 1.0])}
    with pytest.raises(InputError, match="threshold has negative entries"):
        only(place(tmp_path / "a", whole(*made(values))))
