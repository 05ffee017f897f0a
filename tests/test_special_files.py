"""Links are followed: the hub's cache is made of them. What is no file is told, and not opened."""

import os
import re
import sys

import pytest
from damage import ROWS, at_most, check_same, files_of, laid_out

from gemscope import formats
from gemscope.errors import InputError

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.skipif(sys.platform == "win32", reason="makes links, pipes and devices"),
]

GOOD = {row: files_of(row) for row in ROWS}
EACH = [(row, name) for row, files in GOOD.items() for name in files]
OWN = "gemma-scope"


@pytest.mark.parametrize("row", ROWS)
def test_a_folder_of_links_is_read(tmp_path, row):
    """`snapshots/commit/name -> ../../blobs/digest`, as the hub's library lays it out."""
    plain = formats.read(laid_out(tmp_path / "plain", GOOD[row]))
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "commit"
    for number, (name, raw) in enumerate(GOOD[row].items()):
        (tmp_path / "blobs" / str(number)).write_bytes(raw)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        up = os.path.relpath(tmp_path / "blobs" / str(number), (folder / name).parent)
        (folder / name).symlink_to(up)
    check_same(plain, formats.read(folder))
    (tmp_path / "link").symlink_to(folder)
    check_same(plain, formats.read(tmp_path / "link"))
    said, through = formats.inspect(folder), formats.inspect(tmp_path / "link")
    assert [f.resolve() for f in said.files] == [f.resolve() for f in through.files]


def dangling(file):
    file.symlink_to(file.parent / "nowhere")


def circular(file):
    file.symlink_to(file)


def device(file):
    file.symlink_to("/dev/null")


def of_a_folder(file):
    (file.parent / "other").mkdir()
    file.symlink_to(file.parent / "other")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (os.mkdir, "is a folder, not a file"),
        (of_a_folder, "is a folder, not a file"),
        (os.mkfifo, "is a device or a pipe, not a file"),
        (device, "is a device or a pipe, not a file"),
        (dangling, "links to a file that is not there"),
        (circular, "cannot be read: Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize(("row", "name"), EACH)
def test_what_is_no_file_is_told(tmp_path, row, name, make, match):
    folder = laid_out(tmp_path / "a", GOOD[row])
    (folder / name).unlink()
    make(folder / name)
    for use in (formats.inspect, formats.read):
        with at_most(5), pytest.raises(InputError) as told:
            use(folder)
        assert str(told.value).isprintable()
        if row.startswith(OWN):
            assert re.search(rf"{re.escape(name)} {match}", str(told.value))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, device, dangling, circular])
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors", "params_layer_0.safetensors"])
def test_weights_that_are_none_are_named_all_the_same(tmp_path, name, make):
    make(tmp_path / name)
    with at_most(5), pytest.raises(InputError, match=re.escape(name)) as told:
        formats.inspect(tmp_path)
    assert "no weights in" not in str(told.value)


def test_a_header_is_not_looked_for_in_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with at_most(5), pytest.raises(InputError, match="pipe is a device or a pipe, not a file"):
        formats.read_header(tmp_path / "pipe")


@pytest.mark.parametrize("what", ["", "file", "nowhere", "x" * 300])
def test_a_folder_that_is_none_has_no_weights(tmp_path, what):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no weights in"):
        formats.inspect(tmp_path / what)
