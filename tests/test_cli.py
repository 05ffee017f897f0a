"""The commands others call: their fixed answers, and the same numbers as the library."""

import json
import re
from pathlib import Path

import pytest
import torch

KEYS = {
    "address", "tokens", "l0", "fvu", "fvu_global", "mse", "cosine", "loss_clean", "loss_spliced",
    "delta_loss", "kl", "loss_recovered_zero", "loss_recovered_mean", "dead_fraction",
}  # fmt: skip
TEXT = "def area(self, width, height):\n    return width * height\n"


def answer(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(TEXT)
    return file


def test_list_says_what_is_fixed(command, entries):
    rows = answer(command("list", "--release", "miniature", "--json"))
    assert [row["address"] for row in rows] == [e.address for e in entries]
    for row in rows:
        assert row.keys() == {
            "address", "kind", "reads", "writes", "d_in", "d_out", "d_sae", "l0", "affine",
            "model", "canonical",
        }  # fmt: skip
    assert answer(command("list", "miniature transcoder", "--json")) == [
        row for row in rows if row["kind"] == "transcoder"
    ]
    code, out, _ = command("list", "miniature")
    assert code == 0
    assert all(row["address"] in out for row in rows)


def test_list_without_a_filter_shows_the_releases(command):
    code, out, _ = command("list")
    assert code == 0
    assert "gemma-scope-2-1b-pt" in out
    assert out.count("\n") < 40


@pytest.mark.parametrize(
    ("arguments", "addresses"),
    [
        (
            ["--model", "gemma-3-1b-pt", "--site", "22.resid_post", "--width", "65k", "--l0", "60"],
            ["gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium"],
        ),
        (
            [
                "--release",
                "gemma-scope-2b-pt-res",
                "--layer",
                "20",
                "--canonical",
                "--width",
                "16k",
            ],
            ["gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"],
        ),
        (
            ["--kind", "clt", "--model", "gemma-3-270m-it", "--width", "524k", "--l0", "100-200"],
            [
                "gemma-scope-2-270m-it/clt/width_524k_l0_big",
                "gemma-scope-2-270m-it/clt/width_524k_l0_big_affine",
            ],
        ),
    ],
)
def test_list_filters(command, arguments, addresses):
    assert [row["address"] for row in answer(command("list", "--json", *arguments))] == addresses


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--kind", "SAE"], "no kind 'SAE': the kinds are sae, transcoder, crosscoder, clt"),
        (["--site", "resid"], "no stream named 'resid'; nearest: resid_"),
        (["--site", "3.resid_post", "--layer", "4"], "contradict each other"),
        (["--width", "big"], "give 16k, 65k, 1m or a number"),
        (["--l0", "few"], "give a number, or two such as 50-150"),
    ],
)
def test_list_says_what_a_filter_accepts(refused, arguments, match):
    refused("list", *arguments, match=match)


def test_info_leads_to_the_weights_and_the_model(command, entries):
    facts = answer(command("info", entries[0].address, "--json"))
    assert answer(command("list", entries[0].address, "--json"))[0].items() <= facts.items()
    assert (Path(facts["path"]) / "params.safetensors").is_file()
    assert (Path(facts["model_path"]) / "model.safetensors").is_file()
    assert facts["shapes"]["w_enc"] == [facts["d_in"], facts["d_sae"]]


def test_eval_of_a_short_file_is_one_document(command, entries, text_file, tmp_path, miniature):
    found = answer(
        command("eval", entries[0].address, "--text", text_file, "--out", tmp_path, "--json")
    )
    assert found.keys() >= KEYS
    ids = miniature.tokenizer(TEXT, add_special_tokens=False).input_ids
    assert (found["tokens"], found["documents"]) == (len(ids), 1)
    assert found["provenance"]["text"] == str(text_file)
    folder = Path(found["report"]).parent
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "report.md", "report.json", "figures",
    }  # fmt: skip


def test_eval_of_several_is_a_list_in_the_order_asked(command, entries, text_file, tmp_path):
    asked = [entries[-1].address, entries[0].address]
    found = answer(command("eval", *asked, "--text", text_file, "--out", tmp_path, "--json"))
    assert [row["address"] for row in found] == asked
    assert all(row.keys() >= KEYS for row in found)


def test_eval_limits_its_tokens(command, entries, tmp_path):
    found = answer(
        command("eval", entries[0].address, "--tokens", 321, "--out", tmp_path, "--json")
    )
    assert found["tokens"] == 321


def test_eval_prints_a_summary_and_where_the_report_is(command, entries, text_file, tmp_path):
    code, out, _ = command("eval", entries[0].address, "--text", text_file, "--out", tmp_path)
    assert code == 0
    assert "delta loss" in out
    assert "report.html" in out


def test_a_folder_evaluates_like_its_address(command, entries, text_file, tmp_path):
    by_address, by_folder = (
        answer(command("eval", a, "--text", text_file, "--out", tmp_path, "--json"))
        for a in (entries[0].address, entries[0].path)
    )
    for key in KEYS - {"address"}:
        assert by_address[key] == by_folder[key], key


def test_published_figures_stand_beside_the_measured(command, entries, text_file, tmp_path):
    found = answer(
        command("eval", entries[0].address, "--text", text_file, "--out", tmp_path, "--json")
    )
    assert found["published"]["fvu"] > 0
    assert "published" in (Path(found["report"]).parent / "report.md").read_text()


def test_look_agrees_with_a_hook_written_by_hand(command, entry, miniature):
    from safetensors.torch import load_file

    found = answer(command("look", TEXT, "--sae", entry.address, "--top", 7, "--json"))
    ids = miniature.tokenizer(TEXT, return_tensors="pt").input_ids
    seen = {}

    def hook(_module, _args, output):
        seen["x"] = output[0] if isinstance(output, tuple) else output

    handle = miniature.hf.model.layers[entry.reads.layer].register_forward_hook(hook)
    with torch.no_grad():
        miniature.hf(ids)
    handle.remove()
    w = {n: t.float() for n, t in load_file(entry.path / "params.safetensors").items()}
    pre = seen["x"][0] @ w["w_enc"] + w["b_enc"]
    dense = pre * (pre > w["threshold"])
    assert found["tokens"] == [miniature.tokenizer.decode([i]) for i in ids[0]]
    assert len(found["features"]) == ids.shape[1]
    assert found["features"][0] == [], "BOS does not count"
    for row, pairs in list(zip(dense, found["features"], strict=True))[1:]:
        best = row.topk(7)
        assert [p["value"] for p in pairs] == pytest.approx(
            best.values[best.values > 0].tolist(), rel=1e-4
        )
        for pair in pairs:
            assert row[pair["feature"]].item() == pytest.approx(pair["value"], rel=1e-4)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_look_draws(command, entries, tmp_path, suffix):
    for extra in ([], ["--feature", 3]):
        file = tmp_path / f"look{len(extra)}.{suffix}"
        code, out, err = command(
            "look", "cost $5 {x}", "--sae", entries[0].address, "--plot", file, *extra
        )
        assert code == 0, err
        assert file.stat().st_size > 2_000
        assert str(file) in out


def test_doctor_finds_nothing_missing(command):
    facts = answer(command("doctor", "--json"))
    assert facts["problems"] == {}
    assert facts["miniature"]["model"]
    assert facts["packages"]["torch"]


@pytest.mark.slow
def test_demo_shows_a_report_of_some_dictionaries(command, entries, tmp_path):
    code, out, err = command("demo", "--tokens", 600, "--out", tmp_path)
    assert code == 0, err
    evaluated, _, telling = out.partition("What the features of")
    shown = [e for e in entries if f"{e.address} " in evaluated]
    assert len(shown) == 4
    assert {e.kind for e in shown} >= {"sae", "transcoder"}
    (page,) = tmp_path.glob("*/report.html")
    assert page.stat().st_size > 50_000
    assert len(re.findall(r"^Feature \d+, on", telling, re.M)) == 3
    assert len(re.findall(r"gemscope rules 1:\s+rule\s+[01]\.\d\d\s+\[", telling)) == 3
