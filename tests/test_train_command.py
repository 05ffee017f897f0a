"""`gemscope train`: what a person sees of a run, on a terminal and off it."""

import io
import signal

import pytest
import yaml
from rich.console import Console

from gemscope import train
from gemscope.cli import _train
from gemscope.corpus import read_text
from gemscope.errors import InputError
from gemscope.train import Floor, Progress, Standing, Stopped, parse_config

RAW = {
    "model": "miniature",
    "data": {"text": "miniature", "tokens": 1_024, "context": 64, "batch": 256, "buffer": 1_024},
    "artefacts": [
        {
            "reads": "2.resid_post", "d_sae": 64, "l0": 8, "name": "one",
            "sparsity": {"threshold": None, "start_l0": 16, "bandwidth": 0.05},
        }
    ],
}  # fmt: skip


@pytest.fixture
def yaml_file(tmp_path):
    file, text = tmp_path / "run.yaml", tmp_path / "some.txt"
    text.write_text(next(iter(read_text("miniature"))).text[:12_000])  # read quickly
    changes = {"out": str(tmp_path / "out"), "data": RAW["data"] | {"text": str(text)}}
    file.write_text(yaml.safe_dump(RAW | changes))
    return file


def test_the_command_trains_and_says_what_is_next(command, yaml_file, tmp_path):
    code, out, err = command("train", yaml_file, "--set", "data.tokens=768")
    assert code == 0, err
    assert out.splitlines() == [
        f"The artefact: {tmp_path / 'out' / 'one'}",
        f"The report: {tmp_path / 'out' / 'report.html'}",
        f"Evaluate it: gemscope eval {tmp_path / 'out' / 'one'}",
    ]
    assert "\x1b" not in err
    assert "\r" not in err
    first, *_, last = err.splitlines()
    assert first == "training 1 artefact of miniature: 3 steps of 256 tokens"
    for part in ("step 3/3", "tokens/s", "x floor", "FVU", "/ 8", "dead", "optimizer"):
        assert part in last
    assert (tmp_path / "out" / "one").is_dir()
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_mistake_is_told_in_one_line(refused, yaml_file):
    refused("train", yaml_file, "--resume", match="nothing to resume")
    refused("train", yaml_file, "--set", "data.tokens=9000000", match="data.tokens is 9,000,000")


def test_a_stopped_run_says_so_and_ends_with_its_signal(command, yaml_file, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise Stopped(signal.SIGTERM, 3, 4, tmp_path)

    monkeypatch.setattr(train, "train", stopped)
    code, out, err = command("train", yaml_file)
    assert (code, out) == (128 + signal.SIGTERM, "")
    assert err == (
        f"gemscope: stopped at step 3 of 4; the checkpoint is in {tmp_path}: "
        "run the same command to go on\n"
    )


def test_a_smoke_test_takes_a_folder_of_its_own(tmp_path):
    chosen = config(1, out=str(tmp_path / "out"))
    assert _train._fresh(chosen).out == str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out-2").mkdir()
    assert _train._fresh(chosen).out == str(tmp_path / "out-3")


def config(count, **changes):
    artefacts = [RAW["artefacts"][0] | {"name": f"resid_post/artefact_{i}"} for i in range(count)]
    data = RAW["data"] | {"tokens": 256 * 1_000}
    raw = RAW | {"out": "out", "data": data, "artefacts": artefacts} | changes
    return parse_config(raw, source="the test")


def progress(chosen, step, seconds):
    standings = tuple(
        Standing(
            name=a.name, step=step, tokens=step, loss=0.2, fvu=0.1 + i / 100, l0=8_000.0 + i,
            target=a.l0, dead=0.01,
        )
        for i, a in enumerate(chosen.artefacts)
    )  # fmt: skip
    sections = {"data": 1.0, "model": 4.0, "encode": 2.0, "decode": 1.0, "optimizer": 2.0}
    return Progress(
        step=step, steps=chosen.steps, tokens=step * 256, seconds=seconds, sections=sections,
        standings=standings,
    )  # fmt: skip


def on_a_terminal(monkeypatch, width, height):
    to = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    monkeypatch.setattr(_train, "console", lambda **_: to)
    return to


@pytest.mark.parametrize(("width", "height"), [(60, 16), (80, 24), (120, 40)])
@pytest.mark.parametrize("count", [1, 15, 60])
def test_the_table_fits_the_terminal(monkeypatch, count, width, height):
    to, chosen = on_a_terminal(monkeypatch, width, height), config(count)
    view = _train._View(chosen, lambda *_: None)
    view.begun(Floor(products=0.01, parameters=0.02, inputs=0.001))
    view.report(progress(chosen, 1, 0.06))
    view.report(progress(chosen, 2, 0.12))
    plain = Console(file=io.StringIO(), width=width, height=height)
    plain.print(view.table(progress(chosen, 2, 0.12), to))
    lines = plain.file.getvalue().splitlines()
    assert len(lines) < height
    assert all(len(line.rstrip()) <= width for line in lines)
    shown = min(count, 20, height - 4)
    assert len(lines) == shown + 3  # nothing wraps
    assert "3.0x floor" in lines[0]
    assert lines[-1].startswith("time: data 10%, model 40%")
    text = plain.file.getvalue()
    assert f"artefact_{count - 1} " in text  # the worst
    assert "artefact_0 " in text  # the best
    assert (f"... {count - shown + 1} between" in text) == (count > shown)


def test_a_mistake_leaves_nothing_of_the_table(monkeypatch):
    to, chosen = on_a_terminal(monkeypatch, 80, 24), config(2)
    with pytest.raises(InputError), _train._watching(chosen) as view:  # noqa: PT012
        view.report(progress(chosen, 1, 0.1))
        raise InputError("diverged")
    assert to.file.getvalue().rstrip().endswith("\x1b[2K")  # erased line by line


def test_it_is_drawn_seldom_and_at_the_end(monkeypatch):
    chosen, drawn = config(1), []
    now = iter(range(10_000))
    monkeypatch.setattr(_train.time, "monotonic", lambda: next(now) / 1_000)
    view = _train._View(chosen, lambda _, p: drawn.append(p.step))
    for step in range(1, 1_001):
        view.report(progress(chosen, step, step * 0.1))
    assert drawn[0] == 1
    assert drawn[-1] == 1_000
    assert len(drawn) <= 8  # two seconds, by that clock


def test_looks_are_no_part_of_a_step_and_part_of_the_time_left():
    chosen = config(1, evaluate={"every": 100})
    pace, seconds = _train._Pace(chosen), 0.0
    for step in range(1, 251):
        seconds += 0.1 + (5.0 if step % 100 == 1 and step > 1 else 0.0)
        pace.add(progress(chosen, step, seconds))
    assert pace.step_seconds == pytest.approx(0.1)
    # 750 steps, and the looks after steps 300 to 1,000.
    assert pace.left(progress(chosen, 250, seconds)) == pytest.approx(75 + 8 * 5)
