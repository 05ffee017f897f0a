"""Gemma Scope's npz files: read to the bit, in place, whoever wrote them."""

import math
import sys
import zipfile

import numpy as np
import pytest
import torch
from handmade import (
    VALUES,
    arrays,
    drawn,
    facts,
    fields,
    meant,
    npy,
    only,
    part_of,
    place,
    place_npz,
    same,
    zipped,
)

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sae import SAE, JumpReLU
from gemscope.sites import Site, Stream

pytestmark = pytest.mark.usefixtures("unchecked")

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel about mappings")
PUBLISHED = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def published(tensors):
    """Arrays under the names of the published files."""
    return {n: tensors[n.lower()].numpy() for n in PUBLISHED}


def saved(folder, save=np.savez, **changes):
    folder.mkdir(exist_ok=True)
    save(folder / "params.npz", **published(meant()) | changes)
    return folder


# What is read


def test_a_file_made_by_hand_is_read_right(tmp_path):
    folder = place_npz(tmp_path / "a")
    assert same(only(folder), meant())
    assert formats.inspect(folder) == formats.Facts(
        layout="gemma-scope",
        kind=None,
        d_in=2,
        d_sae=3,
        d_out=2,
        affine=False,
        activation="jumprelu",
        dtype="float32",
        files=(folder / "params.npz",),
        shapes={"W_enc": (2, 3), "b_enc": (3,), "W_dec": (3, 2), "b_dec": (2,), "threshold": (3,)},
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_is_read_right(tmp_path, save):
    """It writes headers with 64-bit sizes, and its numbers lie at any offset."""
    folder = saved(tmp_path / "a", save)
    with zipfile.ZipFile(folder / "params.npz") as archive:
        assert archive.infolist()[0].compress_type == (save is np.savez_compressed) * 8
    assert same(only(folder), meant())


class Pipe:
    """A file that can be written only onwards."""

    def __init__(self, file):
        self.file = file

    def write(self, raw):
        return self.file.write(raw)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_was_written_to_a_stream_is_read_right(tmp_path, save):
    """Sizes then stand behind the members, and in the directory."""
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "params.npz").open("wb") as file:
        # numpy takes for a file what can be read.
        pipe = Pipe(file)
        pipe.read = None
        save(pipe, **published(meant()))
    raw = (tmp_path / "a" / "params.npz").read_bytes()
    assert raw[6] & 8
    assert same(only(tmp_path / "a"), meant())


@pytest.mark.parametrize("gap", range(8))
@pytest.mark.parametrize("method", [0, 8])
def test_numbers_at_any_offset_are_read_right(tmp_path, gap, method):
    raw = zipped(arrays(), between=b"?" * gap, method=method)
    assert same(only(place_npz(tmp_path / "a", raw)), meant())


def test_bytes_before_the_archive_shift_it(tmp_path):
    """As in a self-extracting archive: offsets then count from the archive's own begin."""
    assert same(only(place_npz(tmp_path / "a", b"#!/bin/sh\n" + zipped(arrays()))), meant())


def test_numbers_that_are_not_aligned_compute_the_same(tmp_path, generator):
    shapes = {"w_enc": (64, 300), "b_enc": 300, "w_dec": (300, 64), "b_dec": 64, "threshold": 300}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs()
    file = tmp_path / "params.npz"
    np.savez(file, **published(tensors))
    mapped = only(tmp_path)
    assert any(tensor.data_ptr() % 4 for tensor in mapped.values())
    x = torch.randn(33, 64, generator=generator)

    def computed(t):
        site = Site(1, Stream.RESID_POST)
        weights = {n: t[n] for n in ("w_enc", "b_enc", "w_dec", "b_dec")}
        sae = SAE(**weights, activation=JumpReLU(t["threshold"]), reads=site, writes=site)
        return sae.reconstruct(x)

    assert torch.equal(computed(mapped), computed(tensors))


@pytest.mark.parametrize(
    ("descr", "dtype"), [("<f2", torch.float16), ("<f8", torch.float64), ("<f4", torch.float32)]
)
@pytest.mark.parametrize("method", [0, 8])
def test_floats_of_every_size_are_read_as_they_are(tmp_path, descr, dtype, method):
    folder = place_npz(tmp_path / "a", zipped(arrays(descr=descr), method=method))
    assert same(only(folder), meant(dtype=dtype))
    assert formats.inspect(folder).dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("change", [str.lower, str.upper, str])
def test_the_case_of_names_does_not_matter(tmp_path, change):
    members = {change(n.removesuffix(".npy")) + ".npy": v for n, v in arrays().items()}
    folder = place_npz(tmp_path / "a", zipped(members))
    assert same(only(folder), meant())
    assert set(formats.inspect(folder).shapes) == {n.removesuffix(".npy") for n in members}


def test_a_name_in_two_spellings_is_refused(tmp_path):
    members = arrays() | {"w_enc.npy": arrays()["W_enc.npy"]}
    with pytest.raises(InputError, match="has w_enc twice, in two spellings"):
        only(place_npz(tmp_path / "a", zipped(members)))


@pytest.mark.parametrize(
    "extra",
    [
        {"step": np.array(7)},
        {"note": np.array("hello")},
        {"mask": np.array([True, False])},
        {"sparsity": np.full((2, 2), math.nan, np.float32)},
        {"turned": np.asfortranarray(np.ones((2, 3)))},
        {"made": np.zeros(2, np.dtype([("x", "<f4"), ("y", "<i8")]))},
        {"big": np.ones(3, ">f4")},
        {"empty": np.zeros((0, 5), np.float32)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_arrays_that_are_no_weights_are_left_alone(tmp_path, extra):
    folder = saved(tmp_path / "a", **extra)
    assert same(only(folder), meant())
    assert set(formats.inspect(folder).shapes) == set(PUBLISHED)


@pytest.mark.parametrize("scale", [np.ones(3, np.float32), np.ones(()), np.ones((1,), np.float16)])
def test_a_scale_of_ones_changes_nothing(tmp_path, scale):
    assert same(only(saved(tmp_path / "a", scaling_factor=scale)), meant())


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (np.array([1, 1, 1.0000001], np.float64), "scaling_factor is not all ones"),
        (np.zeros((), np.float32), "scaling_factor is not all ones"),
        (np.full(3, math.nan, np.float32), "scaling_factor is not all ones"),
        (np.ones(3, np.int64), "scaling_factor is '<i8', not one of"),
    ],
)
def test_any_other_scale_is_refused(tmp_path, scale, match):
    with pytest.raises(InputError, match=match):
        only(saved(tmp_path / "a", scaling_factor=scale))


def test_a_transcoder_between_widths_is_told_as_one(tmp_path):
    values = VALUES | {"w_dec": ([3, 4], [float(n) for n in range(12)]), "b_dec": ([4], [1.0] * 4)}
    folder = place_npz(tmp_path / "a", zipped(arrays(values)))
    found = formats.inspect(folder)
    assert (found.kind, found.d_in, found.d_out) == ("transcoder", 2, 4)
    assert same(only(folder), meant(values))


# Where it lies


def mapped_from(file):
    """The addresses at which this process has `file` mapped."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if line.rstrip().endswith(str(file))]
    return [tuple(int(n, 16) for n in line[0].split("-")) for line in lines]


def anonymous():
    """Bytes of memory of this process that are in no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@linux
def test_arrays_are_mapped_and_not_copied(tmp_path):
    d_sae = 2**16
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "params.npz"
    column = np.arange(d_sae, dtype=np.float32)
    np.savez(
        file,
        W_enc=np.ones((128, d_sae), np.float32),
        b_enc=column,
        W_dec=np.ones((d_sae, 128), np.float32),
        b_dec=np.zeros(128, np.float32),
        threshold=column,
    )
    assert file.stat().st_size > 64 * 2**20
    only(place_npz(tmp_path / "warm"))  # whatever is loaded and started once
    before = anonymous()
    tensors = only(tmp_path / "a")
    assert anonymous() - before < 16 * 2**20
    spans = mapped_from(file.resolve())
    assert spans
    for name, tensor in tensors.items():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(low <= begin and end <= high for low, high in spans), name
    assert torch.equal(tensors["threshold"], torch.from_numpy(column))


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    folder = place_npz(tmp_path / "a")
    only(folder)["w_enc"].fill_(9.0)
    assert (folder / "params.npz").read_bytes() == zipped(arrays())
    assert same(only(folder), meant())


# Arrays that cannot be right


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_array_is_named(tmp_path, name):
    members = {n: v for n, v in arrays().items() if n != f"{name}.npy"}
    with pytest.raises(InputError, match=f"lacks {name.lower()}; it has .*; nearest: "):
        only(place_npz(tmp_path / "a", zipped(members)))


def test_an_archive_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"lacks w_enc, b_enc, w_dec, b_dec, threshold; it has n"):
        only(place_npz(tmp_path / "a", zipped({})))


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("b_enc", [2], r"b_enc is \[2\] .* ask for \[3\]"),
        ("threshold", [4], r"threshold is \[4\] .* ask for \[3\]"),
        ("b_dec", [3], r"b_dec is \[3\] .* ask for \[2\]"),
        ("w_dec", [2, 3], r"w_dec is \[2, 3\] .* ask for \[3, 3\]"),
        ("w_enc", [3, 2], r"is \[.*\] where w_enc \[3, 2\]"),
        ("w_enc", [6], r"w_enc has shape \[6\]"),
        ("w_dec", [3, 1, 2], r"w_dec has shape \[3, 1, 2\]"),
        ("b_dec", [1, 2], r"b_dec has shape \[1, 2\]"),
        ("threshold", [], r"threshold has shape \[\]"),
        ("w_enc", [2, 0], r"w_enc has shape \[2, 0\]"),
    ],
)
def test_shapes_that_contradict_each_other_are_told(tmp_path, name, shape, match):
    values = VALUES | {name: (shape, [0.0] * math.prod(shape))}
    for method in (0, 8):
        with pytest.raises(InputError, match=match):
            only(place_npz(tmp_path / "a", zipped(arrays(values), method=method)))


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.ones((2, 3), ">f4"), "W_enc is '>f4', not one of <f4, <f2, <f8"),
        (np.ones((2, 3), np.int32), "W_enc is '<i4', not one of"),
        (np.ones((2, 3), np.complex64), "W_enc is '<c8', not one of"),
        (np.ones((2, 3), np.uint16), "W_enc is '<u2', not one of"),  # bfloat16, as some store it
        (np.ones((2, 3), bool), r"W_enc is '\|b1', not one of"),
        (np.full((2, 3), "a"), "W_enc is '<U1', not one of"),
        (np.ones((2, 3), np.dtype([("x", "<f4")])), r"W_enc is \[\('x', '<f4'\)\], not one of"),
        (np.asfortranarray(np.ones((2, 3), np.float32)), "W_enc is in column order"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, match):
    with pytest.raises(InputError, match=match):
        only(saved(tmp_path / "a", W_enc=array))


def test_the_order_of_a_vector_does_not_matter(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (3,), }"
    members = arrays() | {"b_enc.npy": npy([3], VALUES["b_enc"][1], header=header)}
    assert same(only(place_npz(tmp_path / "a", zipped(members))), meant())


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, number):
    shape, numbers = VALUES[name]
    values = VALUES | {name: (shape, [*numbers[:-1], number])}
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        only(place_npz(tmp_path / "a", zipped(arrays(values))))


def test_a_negative_threshold_is_refused(tmp_path):
    values = VALUES | {"threshold": ([3], [1.0, -0.001, 1.0])}
    with pytest.raises(InputError, match="threshold has negative entries"):
        only(place_npz(tmp_path / "a", zipped(arrays(values))))


# What is written


def test_what_is_written_is_read_back_exactly(tmp_path, generator):
    tensors = drawn(generator, torch.float32, affine=False)
    formats.write_gemma_scope(tmp_path / "new" / "a", part_of(tensors))
    assert same(only(tmp_path / "new" / "a"), tensors)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a"]
    with np.load(tmp_path / "new" / "a" / "params.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(PUBLISHED)
        for name in PUBLISHED:
            assert archive[name].dtype == np.float32
            assert np.array_equal(archive[name], tensors[name.lower()].numpy())


def test_bfloat16_is_written_as_the_same_values_in_float32(tmp_path, generator):
    tensors = drawn(generator, torch.bfloat16, affine=False)
    formats.write_gemma_scope_2(tmp_path / "stored", facts(), [part_of(tensors)])
    (part,) = formats.read(tmp_path / "stored")
    assert part.w_enc.dtype is torch.bfloat16
    formats.write_gemma_scope(tmp_path / "written", part)
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert same(only(tmp_path / "written"), wide)
    # And once more: float32 stays as it is.
    (part,) = formats.read(tmp_path / "written")
    formats.write_gemma_scope(tmp_path / "again", part)
    assert same(only(tmp_path / "again"), wide)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": None}, "holds JumpReLU dictionaries without a skip connection"),
        ({"affine_skip_connection": torch.zeros(3, 4)}, "holds JumpReLU dictionaries without a sk"),
        ({"w_dec": torch.full((5, 4), math.nan)}, "w_dec holds NaN"),
        ({"w_dec": torch.zeros(5, 2, 4)}, r"w_dec has shape \[5, 2, 4\]"),
        ({"threshold": torch.full((5,), -1.0)}, "threshold has negative"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, generator, change, match):
    part = part_of(drawn(generator, torch.float32, affine=False) | change)
    with pytest.raises(InputError, match=match) as told:
        formats.write_gemma_scope(tmp_path / "a", part)
    # The file that is named is the one that was asked for, not the one that was made on the way.
    assert "params.npz" not in str(told.value) or str(tmp_path / "a" / "params.npz") in str(
        told.value
    )
    assert list(tmp_path.iterdir()) == []


def test_write_leaves_what_is_there_alone(tmp_path, generator):
    part = part_of(drawn(generator, torch.float32, affine=False))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists; choose another folder"):
        formats.write_gemma_scope(tmp_path / "a", part)
    with pytest.raises(InputError, match="mine/a cannot be written"):
        formats.write_gemma_scope(tmp_path / "a" / "mine" / "a", part)
    assert [f.name for f in tmp_path.rglob("*")] == ["a", "mine"]


def test_both_layouts_in_one_folder_are_told(tmp_path):
    place(place_npz(tmp_path / "a"))
    with pytest.raises(InputError, match=r"holds several artefacts: params\.npz, params\.safet"):
        formats.read(tmp_path / "a")


def test_a_view_of_a_mapped_part_outlives_the_rest(tmp_path):
    """The mapping lasts as long as anything that looks into it."""
    row = fields(formats.read(place_npz(tmp_path / "a"))[0])["w_dec"][1]
    (tmp_path / "a" / "params.npz").unlink()
    assert row.tolist() == [1.5, 2.5]
