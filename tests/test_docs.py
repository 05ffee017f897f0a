"""What the documentation shows is run here."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_example_runs(name, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, name, "exec"), {})
    l0, top, shape = capsys.readouterr().out.strip().splitlines()
    assert "tensor(" in l0
    assert len(eval(top)) == 3
    assert "4096" in shape


def test_both_languages_name_every_command():
    from gemscope.cli import app

    verbs = {command.name for command in app.registered_commands}
    for name in ("README.md", "README.zh.md"):
        shown = set(re.findall(r"`gemscope (\w+)", (ROOT / name).read_text("utf-8")))
        assert verbs == shown, name


@pytest.mark.parametrize("file", [p.name for p in ROOT.glob("*.md")])
def test_links_point_at_something(file):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text("utf-8")):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{file} links to {target}"


def test_every_command_explains_itself(command):
    from gemscope.cli import app

    for verb in app.registered_commands:
        code, out, _ = command(verb.name, "--help")
        assert code == 0
        assert verb.callback.__doc__.split(".")[0].split()[0] in out
        for option in re.findall(r"^  (--\S+).*$", out, re.M):
            assert option


def test_records_of_measurements_are_whole():
    keys = {"commit", "command", "hardware", "seconds", "tokens", "max_memory_bytes"}
    records = sorted((ROOT / "benchmarks").glob("*.jsonl"))
    assert records
    for file in records:
        assert re.fullmatch(r"[a-z0-9-]+_[a-z0-9-]+_\d{4}-\d{2}-\d{2}\.jsonl", file.name)
        for line in file.read_text("utf-8").splitlines():
            assert keys <= json.loads(line).keys()
            assert "dirty" not in json.loads(line)["commit"]


def test_what_is_published_of_the_miniature_is_what_is_measured(entries):
    """The card's table and the catalog's figures are the same numbers."""
    from gemscope import hub, miniature

    card = (miniature.MODEL.parent / "MODEL_CARD.md").read_text("utf-8")
    for entry in entries:
        figures = hub.published(entry)
        assert figures is not None
        (row,) = [line for line in card.splitlines() if f"`{entry.address}`" in line]
        assert f"| {figures['l0']:.1f} | {figures['fvu']:.3f} |" in row


def test_the_miniature_keeps_its_promises(entries):
    from gemscope import hub, miniature

    card = (miniature.MODEL.parent / "MODEL_CARD.md").read_text("utf-8")
    (bits,) = re.findall(r"([\d.]+) bits per byte", card)
    assert float(bits) <= 1.10
    assert sum(e.kind == "sae" and e.reads.stream == "resid_post" for e in entries) >= 3
    assert sum(e.kind == "transcoder" and e.affine for e in entries) >= 1
    for entry in entries:
        figures = hub.published(entry)
        assert 8 <= entry.d_sae / entry.d_in <= 16
        assert figures["l0"] == pytest.approx(entry.l0, rel=0.15)
        assert figures["dead_fraction"] < 0.05


def test_the_text_shows_no_path_of_a_machine():
    for file in [*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md")]:
        assert not re.search(r"/(home|root|work|Users)/", file.read_text("utf-8")), file
