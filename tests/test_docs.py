"""What the documentation shows is run here."""

import json
import re
from pathlib import Path

import pytest

from gemscope.sites import each

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
    verbs |= {group.name for group in app.registered_groups}
    for name in ("README.md", "README.zh.md"):
        shown = set(re.findall(r"`gemscope ([\w-]+)", (ROOT / name).read_text("utf-8")))
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
    of = {e: hub.published(e) for e in entries}
    for entry, figures in of.items():
        assert figures["l0"] == pytest.approx(entry.l0, rel=0.1), entry.address
        # Some features of the last layer's attention are of files that it was trained on.
        few = entry.address.endswith("attn_out_all/layer_5_width_128_l0_small")
        assert figures["dead_fraction"] < (0.06 if few else 0.03), entry.address
        big = entry.address.endswith("_l0_big") and "/resid_post" in entry.address
        assert not big or figures["loss_recovered_mean"] >= 0.95, entry.address
    for group in groups(entries, lambda e: (e.reads, e.writes, e.affine, e.d_sae)):
        ladder = [of[e]["fvu"] for e in sorted(group, key=lambda e: e.l0)]
        assert ladder == sorted(ladder, reverse=True), [e.address for e in group]
    for group in groups(entries, lambda e: (e.reads, e.writes, e.affine, e.l0)):
        ladder = [of[e]["fvu"] for e in sorted(group, key=lambda e: e.d_sae)]
        assert ladder == sorted(ladder, reverse=True), [e.address for e in group]


def test_the_miniature_has_every_layer_site_and_kind(entries):
    for layer in range(6):
        for suite in ("resid_post_all", "attn_out_all", "mlp_out_all", "transcoder_all"):
            mine = [e for e in entries if f"/{suite}/layer_{layer}_" in e.address]
            assert len(mine) == (4 if suite == "transcoder_all" else 2)
            assert {e.affine for e in mine} == {False, suite == "transcoder_all"}
            for affine in {e.affine for e in mine}:
                assert len({e.l0 for e in mine if e.affine == affine}) == 2
    of_3 = [e for e in entries if "/resid_post" in e.address and str(e.reads) == "3.resid_post"]
    assert len({e.l0 for e in of_3 if e.d_sae == 384}) == 4
    assert len({e.d_sae for e in of_3 if e.l0 == 48}) == 3
    assert [e.kind for e in entries if len(each(e.reads)) > 1] == ["clt", "crosscoder"]


def groups(entries, key):
    found = {}
    for entry in entries:
        found.setdefault(str(key(entry)), []).append(entry)
    return [some for some in found.values() if len(some) > 1]


def test_the_text_shows_no_path_of_a_machine():
    for file in [*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md")]:
        assert not re.search(r"/(home|root|work|Users)/", file.read_text("utf-8")), file
