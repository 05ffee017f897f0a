"""`gemscope serve` as a process: its start, its end, and the store it makes when none is named."""

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request

import explorer
import pytest
from filelock import FileLock

from gemscope.explorer import _first, open_workbench
from gemscope.explorer._first import Making, make


def read(address, path="/"):
    with urllib.request.urlopen(address + path, timeout=60) as answer:
        return answer.status, answer.read().decode()


def state(folder):
    return json.loads((folder.parent / f"{folder.name}.making.json").read_text())


@pytest.fixture
def quick(monkeypatch, small_store):
    """Making that takes no time: a copy of a small store."""

    def copied(folder):
        _first._say(folder, "indexing", 1, 2)
        shutil.copytree(small_store, folder, dirs_exist_ok=True)

    monkeypatch.setattr(_first, "_make", copied)


def test_a_store_is_made_once(quick, tmp_path):
    folder = tmp_path / "cache" / "miniature"
    making = Making(folder)
    assert making.told()["what"] == "loading the model"
    assert make(folder) == 0
    assert (making.told(), making.poll()) == (None, 0)
    (folder / "store.json").touch()
    before = (folder / "store.json").stat().st_mtime_ns
    assert make(folder) == 0
    assert (folder / "store.json").stat().st_mtime_ns == before


def test_only_one_makes_it(quick, tmp_path):
    folder = tmp_path / "miniature"
    with FileLock(_first.beside(folder, "lock")):
        assert make(folder) == 0
        assert Making(folder).told()["mistake"] is None
    assert not folder.exists()


def test_a_failure_is_told(monkeypatch, tmp_path):
    def failing(folder):
        raise OSError("no space left\nmore")

    monkeypatch.setattr(_first, "_make", failing)
    folder = tmp_path / "miniature"
    assert make(folder) == 1
    making = Making(folder)
    # Of an earlier server: this one begins again.
    assert making.told()["mistake"] is None
    making._process = type("Ended", (), {"poll": lambda self: 1})()
    assert making.told()["mistake"] == "no space left"


def test_whoever_makes_it_may_be_killed(monkeypatch, tmp_path):
    begun = []
    making = Making(tmp_path / "miniature")
    monkeypatch.setattr(making, "start", lambda: begun.append(1))
    making._process = type("Ended", (), {"poll": lambda self: 0})()
    with FileLock(_first.beside(making.folder, "lock")):
        assert making.told()["mistake"] is None
    assert begun == []
    making.told()
    assert begun == [1]


def test_a_damaged_store_is_put_aside(monkeypatch, tmp_path, small_store, capsys):
    folder = tmp_path / "cache" / "miniature"
    shutil.copytree(small_store, folder)
    shutil.rmtree(folder / "dictionaries.lance")
    monkeypatch.setattr("gemscope.explorer._serve.first_folder", lambda: folder)
    monkeypatch.setattr(Making, "start", lambda self: None)
    bench = open_workbench([])
    assert bench.known() == {}
    assert bench.making is not None
    assert len([f for f in folder.parent.iterdir() if ".damaged-" in f.name]) == 1
    assert "put aside as" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_promptly_and_in_silence(tmp_path, small_store, how):
    serving = explorer.Serving(small_store, cache=tmp_path)
    assert read(serving.address)[0] == 200
    code, err, seconds = serving.stop(how)
    assert code in (0, 130, 143), err
    assert err == ""
    assert seconds < 6


@pytest.mark.slow
def test_two_servers_make_one_store_whatever_is_killed(tmp_path):
    one = explorer.Serving(cache=tmp_path)
    two = explorer.Serving(cache=tmp_path)
    try:
        for serving in (one, two):
            assert "is being made" in read(serving.address)[1]
        assert len(makers(tmp_path)) == 1
        one.stop(signal.SIGKILL)
        # Whoever makes it is killed too: the other server goes on.
        for process in makers(tmp_path):
            os.kill(process, signal.SIGKILL)
        until = time.monotonic() + 900
        while "is being made" in read(two.address, "/making")[1]:
            assert time.monotonic() < until, read(two.address, "/making")
            time.sleep(1)
        assert "is ready" in read(two.address, "/making")[1]
        found = json.loads(read(two.address, "/api/scope")[1])
        assert found["indexed"] == len(_first.FIRST)
        assert two.stop()[0] in (0, 130)
        # The next one finds it.
        three = explorer.Serving(cache=tmp_path)
        assert "is being made" not in read(three.address)[1]
        three.stop()
        assert makers(tmp_path) == []
    finally:
        for process in makers(tmp_path):
            os.kill(process, signal.SIGKILL)
        for serving in (one, two):
            serving.process.kill()


def makers(cache):
    """Processes that make the store of `cache`, but for those that have just found another."""
    time.sleep(2)
    found = []
    for folder in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if folder.isdecimal():
            try:
                with open(f"/proc/{folder}/cmdline", "rb") as file:
                    words = file.read().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            if "gemscope.explorer._first" in words and str(cache) in " ".join(words):
                found.append(int(folder))
    return found


@pytest.mark.slow
def test_the_demo_can_be_looked_at(tmp_path):
    out = tmp_path / "reports"
    demo = ("demo", "--tokens", "600", "--out", str(out), "--serve")
    serving = explorer.Serving(cache=tmp_path / "cache", verb=demo)
    try:
        (page,) = out.glob("*/report.html")
        assert any(f"gemscope serve {page.parent / 'catalog'}" in line for line in serving.said)
        assert read(serving.address)[0] == 200
        address = "miniature/transcoder_all/layer_2_width_192_l0_small_affine"
        assert "Steer with this" in read(serving.address, f"/feature/{address}/3")[1]
    finally:
        code, err, _ = serving.stop()
    assert code in (0, 130)
    assert "Traceback" not in err
