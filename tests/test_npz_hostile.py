"""Npz files made to do harm, or damaged: refused in one sentence, before anything is allocated."""

import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from handmade import VALUES, arrays, deflated, meant, npy, only, place_npz, same, zipped

from gemscope import formats
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")

W = "W_enc.npy"
LONG = {
    "w_enc": ([2, 2_000], [n / 7 for n in range(4_000)]),
    "b_enc": ([2_000], [0.5] * 2_000),
    "w_dec": ([2_000, 2], [n / 11 for n in range(4_000)]),
    "b_dec": ([2], [1.0, 2.0]),
    "threshold": ([2_000], [1.5] * 2_000),
}
"""Arrays that do not end where their headers are looked for."""


def refused(folder, raw, match):
    """Both facts and tensors of the archive `raw` are refused, for a reason that matches."""
    place_npz(folder / "a", raw)
    for use in (formats.inspect, formats.read):
        with pytest.raises(InputError, match=match) as error:
            use(folder / "a")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500 + len(str(folder))


# Python objects


class Planted:
    """Whoever unpickles it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


@pytest.mark.parametrize("name", ["W_enc", "extra", "scaling_factor"])
def test_python_objects_are_never_loaded(tmp_path, name):
    planted = tmp_path / "planted"
    raw = io.BytesIO()
    objects = np.array([Planted(planted)], object)
    np.savez(raw, **{n.removesuffix(".npy"): np.ones(1) for n in arrays()} | {name: objects})
    refused(tmp_path, raw.getvalue(), f"{name} holds Python objects, which are never loaded")
    assert not planted.exists()
    # It would have worked on a reader that loads them.
    with np.load(tmp_path / "a" / "params.npz", allow_pickle=True) as archive:
        archive[name]
    assert planted.exists()


def test_a_bare_pickle_is_never_loaded(tmp_path):
    """`numpy.load` takes what is no npz for a pickle."""
    planted = tmp_path / "planted"
    refused(tmp_path, pickle.dumps(Planted(planted)), "is not a zip archive")
    member = arrays() | {W: pickle.dumps(Planted(planted))}
    refused(tmp_path, zipped(member), "the header of W_enc cannot be read")
    assert not planted.exists()


# Damage


@pytest.mark.parametrize("method", [0, 8])
def test_a_file_cut_anywhere_is_refused(tmp_path, method):
    folder, sound = tmp_path / "a", zipped(arrays(), method=method)
    for length in range(len(sound)):
        place_npz(folder, sound[:length])
        with pytest.raises(InputError, match="is not a zip archive, or it is damaged"):
            formats.read(folder)
    assert same(only(place_npz(folder, sound)), meant())


def test_a_compressed_array_is_checked_against_its_checksum(tmp_path):
    raw = zipped(arrays(LONG), method=8, central={W: {"crc": 1}})
    with pytest.raises(InputError, match=r"cannot be read: Bad CRC-32 for file 'W_enc\.npy'"):
        only(place_npz(tmp_path / "a", raw))
    assert same(only(place_npz(tmp_path / "a", zipped(arrays(LONG), method=8))), meant(LONG))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "[]",
        "5",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [2, 3]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': {2, 3}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': {2: 0, 3: 0}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': '23'}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2.0, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 6)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, " + "1, " * 20 + ")}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 3_000 + ", 0)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(), 3)}",
        "{'descr': '\\d', 'fortran_order': False, 'shape': (2, 3)}",
        "(" * 2_000,
        "-" * 2_000 + "1",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}" + " " * 4_200,
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    members = arrays() | {W: npy([2, 3], VALUES["w_enc"][1], header=header)}
    for method in (0, 8):
        refused(tmp_path, zipped(members, method=method), "the header of W_enc cannot be read")


def of_version(version):
    """The first array with the longer header of later versions."""
    one = arrays()[W]
    return one[:6] + bytes([version, 0]) + struct.pack("<I", len(one[10:]) - 24) + one[10:]


@pytest.mark.parametrize("version", [0, 4, 255])
def test_a_version_that_is_not_known_is_refused(tmp_path, version):
    members = arrays() | {W: of_version(version)}
    refused(tmp_path, zipped(members), "the header of W_enc cannot be read")


@pytest.mark.parametrize("version", [2, 3])
def test_the_later_versions_of_the_header_are_read(tmp_path, version):
    members = arrays() | {W: of_version(version)}
    assert same(only(place_npz(tmp_path / "a", zipped(members))), meant())


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_an_array_that_is_not_its_bytes_is_refused(tmp_path, change):
    content = arrays()[W]
    content = content + b"\0" * change if change > 0 else content[:change]
    for method in (0, 8):
        raw = zipped(arrays() | {W: content}, method=method)
        refused(tmp_path, raw, r"W_enc is \[2, 3\] and \d+ bytes long")


# A directory that lies


TERABYTE = 2**40


@pytest.mark.parametrize(
    ("method", "lie", "match"),
    [
        (
            0,
            {"size": TERABYTE, "packed": TERABYTE},
            r"'W_enc.npy' claims 1,099,511,627,776 bytes, which",
        ),
        (0, {"size": TERABYTE}, r"'W_enc.npy' claims 1,099,511,627,776 bytes, which is not what"),
        (8, {"size": TERABYTE}, r"claims to hold 1,099,511,62\d,\d+ bytes in \d+, compressed"),
        (8, {"packed": TERABYTE}, "'W_enc.npy' claims 152 bytes, which is not what a file of"),
        (0, {"offset": 2**62}, "'W_enc.npy' claims 152 bytes, which is not what a file of"),
        (0, {"offset": 2**64 - 1}, "'W_enc.npy' claims 152 bytes, which is not what a file of"),
        (0, {"offset": 5_000}, "'W_enc.npy' claims 152 bytes, which is not what a file of"),
        (0, {"offset": 7}, "says one thing of 'W_enc.npy' in its directory and another beside it"),
        (
            0,
            {"size": 148, "packed": 148},
            "says one thing of 'W_enc.npy' in its directory and anoth",
        ),
        (8, {"size": 148}, "says one thing of 'W_enc.npy' in its directory and another beside it"),
        (0, {"size": 0, "packed": 0}, "says one thing of 'W_enc.npy' in its directory and another"),
        (0, {"method": 8}, "says one thing of 'W_enc.npy' in its directory and another beside it"),
        (8, {"method": 0}, "'W_enc.npy' claims 152 bytes, which is not what a file"),
        (0, {"method": 12}, "'W_enc.npy' is encrypted, or compressed in a way that cannot be"),
        (0, {"method": 14}, "'W_enc.npy' is encrypted, or compressed in a way that cannot be"),
        (0, {"method": 99}, "'W_enc.npy' is encrypted, or compressed in a way that cannot be"),
        (0, {"flags": 1}, "'W_enc.npy' is encrypted, or compressed in a way that cannot be"),
        (0, {"flags": 64}, "is not a zip archive, or it is damaged"),
        (0, {"name": "W_dec2.npy"}, "says one thing of 'W_dec2.npy' in its directory and another"),
    ],
)
def test_what_the_directory_says_is_held_against_the_file(tmp_path, method, lie, match):
    refused(tmp_path, zipped(arrays(), method=method, central={W: lie}), match)


@pytest.mark.parametrize(
    "lie",
    [
        {"size": 148},
        {"packed": 148},
        {"packed": 0, "size": 0},
        {"method": 8},
        {"flags": 1},
        {"packed": 2**32 - 1, "size": 2**32 - 1, "extra": struct.pack("<2H2Q", 1, 16, 148, 148)},
        {"packed": 2**32 - 1, "size": 2**32 - 1, "extra": struct.pack("<2H2Q", 1, 16, 2**63, 152)},
    ],
)
def test_what_a_member_says_of_itself_is_held_against_the_directory(tmp_path, lie):
    match = r"says one thing of 'W_enc\.npy' in its directory and another beside it"
    refused(tmp_path, zipped(arrays(), local={W: lie}), match)


@pytest.mark.parametrize("extra", [b"", struct.pack("<2HQ", 1, 8, 152), b"\1\0\20", b"\7\0\0\0"])
def test_sizes_that_are_nowhere_are_refused(tmp_path, extra):
    lie = {"packed": 2**32 - 1, "size": 2**32 - 1, "extra": extra}
    refused(tmp_path, zipped(arrays(), local={W: lie}), "is not a zip archive, or it is damaged")


def test_a_member_without_a_mark_is_refused(tmp_path):
    for place in range(4):
        raw = bytearray(zipped(arrays()))
        raw[place] ^= 1
        refused(tmp_path, bytes(raw), r"says one thing of 'W_dec\.npy' in its directory")


def test_sizes_of_64_bits_are_read(tmp_path):
    other = struct.pack("<2H3s", 0x5455, 3, b"abc")  # a date, which some writers add
    said = {"packed": 2**32 - 1, "size": 2**32 - 1}
    said["extra"] = other + struct.pack("<2H2Q", 1, 16, 152, 152)
    assert same(only(place_npz(tmp_path / "a", zipped(arrays(), local={W: said}))), meant())


def test_members_that_overlap_are_refused(tmp_path):
    """Many entries that name one member would be a large archive in a small file."""
    sound = zipped(arrays())
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        begin = archive.getinfo("b_enc.npy").header_offset
    # The last member's own header lies within the numbers of the one before.
    first, second = npy([2, 3], VALUES["w_enc"][1]), arrays()["b_enc.npy"]
    inner = zipped({"b_enc.npy": second})
    rest = {n: v for n, v in arrays().items() if n not in (W, "b_enc.npy")}
    inside = inner[: 30 + len("b_enc.npy") + len(second)]
    raw = zipped({W: first + inside, **rest, "b_enc.npy": second})
    offset = raw.index(inside)
    assert offset < begin
    raw = zipped({W: first + inside, **rest, "b_enc.npy": second},
                 central={"b_enc.npy": {"offset": offset}})  # fmt: skip
    refused(tmp_path, raw, r"the members of .* overlap")


def test_a_member_that_reaches_into_the_directory_is_refused(tmp_path):
    members = list(arrays().items())
    name, last = members[-1]
    longer = {"size": len(last) + 60, "packed": len(last) + 60}
    raw = zipped(members, central={name: longer}, local={name: longer})
    refused(tmp_path, raw, "overlap, or it is cut short|is not what a file of")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    refused(tmp_path, zipped([*arrays().items(), (W, arrays()[W])]), "or one of them twice")
    # To Python, a name ends at a zero.
    shadow = (W + "\0x", arrays()[W])
    refused(tmp_path, zipped([*arrays().items(), shadow]), "or one of them twice|is no array")


@pytest.mark.parametrize(
    "name",
    ["../W_enc.npy", "/etc/W_enc.npy", "a/b.npy", "..npy", ".npy", "C:\\x.npy", "README", "a.npy/",
     "a\nb.npy", "\x1b[2J.npy", "a b.npy", "x" * 300 + ".npy", "W_enc.NPY", "W_enc.npy.npy"],
)  # fmt: skip
def test_a_name_that_is_no_array_is_refused(tmp_path, name):
    refused(tmp_path, zipped([*arrays().items(), (name, arrays()[W])]), "which is no array")


def test_more_members_than_any_dictionary_has_are_refused(tmp_path):
    many = {f"x{n}.npy": b"" for n in range(1_001)}
    refused(tmp_path, zipped(arrays() | many), "holds 1006 members, or one of them twice")


# Bombs


def test_a_stream_that_is_longer_than_it_says_is_not_unpacked(tmp_path):
    """64 megabytes of zeros in as many kilobytes, called 16 kilobytes long."""
    content = arrays(LONG)[W]
    bomb = deflated(content + bytes(2**26))
    assert len(bomb) < 2**17
    lie = {"method": 8, "size": len(content)}
    raw = zipped(arrays(LONG) | {W: bomb}, central={W: lie}, local={W: lie})
    place_npz(tmp_path / "a", raw)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="Bad CRC-32"):
            only(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_zeros_that_unpack_to_more_than_a_file_can_mean_are_refused(tmp_path):
    content = npy([1, 2**24 + 2**20], header=None or str(
        {"descr": "<f4", "fortran_order": False, "shape": (1, 2**24 + 2**20)}))  # fmt: skip
    packed = deflated(content + bytes(4 * (2**24 + 2**20)))
    lie = {"method": 8, "size": len(content) + 4 * (2**24 + 2**20)}
    raw = zipped(arrays() | {W: packed}, central={W: lie}, local={W: lie})
    refused(tmp_path, raw, r"claims to hold 71,30\d,\d+ bytes in \d+,\d+, compressed: weights do")


def test_a_stream_that_is_shorter_than_it_says_is_refused(tmp_path):
    content = arrays(LONG)[W]
    lie = {"size": len(content), "method": 8, "crc": zlib.crc32(content[:-4])}
    raw = zipped(arrays(LONG) | {W: deflated(content[:-4])}, central={W: lie}, local={W: lie})
    with pytest.raises(InputError, match="cannot be read: W_enc ends after 15,996 of 16,000 bytes"):
        only(place_npz(tmp_path / "a", raw))


def test_a_stream_that_is_none_is_refused(tmp_path):
    lie = {"size": 152, "method": 8}
    raw = zipped(arrays() | {W: b"\xff" * 50}, central={W: lie}, local={W: lie})
    refused(tmp_path, raw, "is not a zip archive, or it is damaged")
