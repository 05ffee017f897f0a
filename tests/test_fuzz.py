"""Damaged files of every layout are refused, or read by the letter; nothing else happens."""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from damage import ANCHORS, KINDS, ROWS, damaged, examined, files_of, laid_out
from handmade import CONFIG, LAYERS, arrays, deflated, made, npy, place, whole, zipped
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope import formats
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")

LARGEST = 2**34
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(ANCHORS),
        st.integers(0, LARGEST),
        st.integers(0, LARGEST),
    ),
    min_size=1,
    max_size=3,
)
GOOD = {row: files_of(row) for row in ROWS}
TIMES = [100, pytest.param(800, marks=pytest.mark.slow)]


def spoilt(files, choice, damage):
    """`files` with one of them damaged."""
    name = sorted(files)[choice % len(files)]
    return files | {name: damaged(files[name], damage)}


def test_every_layout_has_a_row():
    with tempfile.TemporaryDirectory() as made:
        folders = [laid_out(Path(made) / str(n), files) for n, files in enumerate(GOOD.values())]
        found = [formats.inspect(folder).layout for folder in folders]
    assert set(found) == {layout.name for layout in formats.LAYOUTS}
    assert all(row.startswith(layout) for row, layout in zip(ROWS, found, strict=True))


@pytest.mark.parametrize("row", ROWS)
def test_sound_files_are_read_by_the_letter(row, monkeypatch):
    """Other parsers agree with ours on them, and it is noticed if they do not."""
    assert examined(GOOD[row])
    read = formats.read

    def wrongly(folder):
        first, *rest = read(folder)
        monkeypatch.setattr(formats, "read", read)
        return (replace(first, w_dec=first.w_dec * 2), *rest)

    monkeypatch.setattr(formats, "read", wrongly)
    with pytest.raises(AssertionError, match="w_dec"):
        examined(GOOD[row])


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("row", ROWS)
def test_damage_is_refused_or_read_by_the_letter(row, times):
    @settings(deadline=None, max_examples=times, derandomize=times < 1_000)
    @given(st.integers(0, 7), DAMAGE)
    def examine(choice, damage):
        examined(spoilt(GOOD[row], choice, damage))

    examine()


@pytest.mark.parametrize("times", TIMES)
def test_a_damaged_config_is_refused_or_read_by_the_letter(times):
    @settings(deadline=None, max_examples=times)
    @given(DAMAGE)
    def examine(damage):
        raw = damaged(json.dumps(CONFIG).encode(), damage)
        with tempfile.TemporaryDirectory() as folder:
            place(Path(folder))
            (Path(folder) / "config.json").write_bytes(raw)
            try:
                config = asdict(formats.read_config(Path(folder)))
            except InputError:
                return
        said = json.loads(raw)
        assert {n: type(v) for n, v in config.items()} == {n: type(v) for n, v in CONFIG.items()}
        assert all(config[n] == said[n] for n in config if n != "model_name")
        assert 0 < config["l0"] <= config["width"]

    examine()


ROOM = 256 * 2**20
HUGE = 2**31


def greedy():
    """Folders whose files promise, or make, far more than they hold."""
    zeros = npy([HUGE // 4]) + bytes(2**20)
    lie = {"packed": len(deflated(zeros)), "size": HUGE}
    content = arrays() | {"b_enc.npy": zeros}
    bomb = zipped(content, method=8, local={"b_enc.npy": lie}, central={"b_enc.npy": lie})
    stored = {"packed": HUGE, "size": HUGE}
    claim = zipped(content, local={"b_enc.npy": stored}, central={"b_enc.npy": stored})
    header, data = made()
    brackets = b'{"a": [' + b"[]," * 2**23 + b"[]]}"
    layer, rest = made({n: v for n, v in LAYERS[0].items() if n != "w_dec"})
    layer["w_dec"] = {"dtype": "F32", "shape": [0, HUGE, 2], "data_offsets": [len(rest)] * 2}
    return [
        {"params.npz": bomb},
        {"params.npz": claim},
        {"params.safetensors": whole(brackets, data)},
        {"params.safetensors": whole(header, data), "config.json": brackets},
        {"params_layer_0.safetensors": whole(layer, rest)},
    ]


def in_little_memory(seed, times):
    """Damage to every layout in a process that can hardly allocate; how often it was read."""
    import resource

    assert all(examined(files) for files in GOOD.values())  # load whatever is loaded once
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    assert not any(examined(files) for files in greedy())
    draw, read = random.Random(seed), 0
    for _ in range(times):
        for row in ROWS:
            damage = [
                (draw.choice(KINDS), draw.choice(ANCHORS), draw.randint(0, LARGEST),
                 draw.randint(0, LARGEST))
                for _ in range(draw.randint(1, 3))
            ]  # fmt: skip
            choice = draw.randint(0, 7)
            try:
                read += examined(spoilt(GOOD[row], choice, damage))
            except BaseException:
                print("row", row, "choice", choice, "damage", damage)
                raise
    return read


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("times", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_damage_takes_neither_memory_nor_time(times):
    probe = f"import test_fuzz; print(test_fuzz.in_little_memory(0, {times}))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=60 + times / 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Some damage does not show, most does: a harness that damages nothing would find nothing.
    assert 0 < int(done.stdout) < times * len(ROWS) / 2
