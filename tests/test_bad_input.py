"""A user's mistakes: exit code 2, one sentence on stderr, nothing on stdout, nothing lost."""

import json
import math
import shutil
import sys

import pytest
import torch

from gemscope import formats

pytestmark = pytest.mark.usefixtures("unchecked")
PARAMETERS = "params.safetensors"


@pytest.fixture
def copy(entry, tmp_path):
    """A copy of the artefact, with changes to its config."""

    def make(**changes):
        folder = tmp_path / "copy"
        shutil.copytree(entry.path, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


@pytest.fixture
def small(tmp_path):
    """A narrow dictionary of given widths, with changes to its tensors."""

    def make(d_in, changes=()):
        folder = tmp_path / "small"
        tensors = {
            "w_enc": torch.ones(d_in, 8),
            "b_enc": torch.zeros(8),
            "w_dec": torch.ones(8, d_in),
            "b_dec": torch.zeros(d_in),
            "threshold": torch.ones(8),
        }
        config = formats.Config(
            hf_hook_point_in="model.layers.1.output",
            hf_hook_point_out="model.layers.1.output",
            width=8,
            model_name="gemscope/miniature",
            architecture="jump_relu",
            l0=2.0,
            affine_connection=False,
            type="sae",
        )
        formats.write_gemma_scope_2(folder, config, [formats.Part(**tensors)])
        if changes:
            from safetensors.torch import save_file

            save_file(tensors | dict(changes), folder / PARAMETERS)
        return folder

    return make


@pytest.mark.parametrize("verb", ["info", "eval"])
def test_an_unknown_address_is_told_the_nearest(refused, entry, verb):
    refused(verb, entry.address[:-1], match=f"no artefact at .*nearest: .*{entry.address}")


@pytest.mark.parametrize("address", ["", "~nobody-of-this-name/x", "x" * 5_000, "a\0b", "a\nb"])
def test_what_cannot_be_a_path_is_an_unknown_address(refused, address):
    refused("info", address, match="no artefact at ")


def test_a_folder_without_weights_is_refused(refused, copy):
    folder = copy()
    (folder / PARAMETERS).unlink()
    refused("eval", folder, match=f"no weights in {folder}")


def test_truncated_weights_are_refused(refused, copy):
    file = copy() / PARAMETERS
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    refused("eval", file.parent, match="cut short")


def test_weights_of_contradictory_shapes_are_refused(refused, small):
    refused("eval", small(4, {"b_enc": torch.zeros(9)}), match=r"b_enc is \[9\]")


def test_weights_that_are_not_numbers_are_refused(refused, small):
    folder = small(4, {"b_dec": torch.full((4,), math.nan)})
    refused("eval", folder, match="b_dec holds NaN")
    refused("look", "hello", "--sae", folder, match="b_dec holds NaN")


def test_a_dictionary_of_another_model_is_refused(refused, copy, tmp_path):
    folder = copy(model_name="someone/else")
    refused(
        "eval", folder, "--model", "miniature", "--out", tmp_path,
        match="belongs to someone/else, not to gemscope/miniature",
    )  # fmt: skip
    refused("look", "a", "--sae", folder, "--model", "miniature", match="belongs to someone/else")


def test_a_model_that_is_not_there_is_refused(refused, copy, tmp_path):
    folder = copy(model_name="someone/else")
    refused("eval", folder, "--out", tmp_path, match="someone/else is not in the cache")


def test_a_damaged_model_is_refused(refused, entry, tmp_path):
    from gemscope import miniature

    shutil.copytree(miniature.MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    refused(
        "eval", entry.address, "--model", tmp_path / "model", "--out", tmp_path,
        match="cannot be loaded",
    )  # fmt: skip


def test_a_dictionary_of_another_width_is_refused(refused, entry, small, tmp_path):
    folder = small(entry.d_in // 2)
    match = f"reads {entry.d_in // 2} numbers at 1.resid_post, .* has {entry.d_in}"
    refused("eval", folder, "--out", tmp_path, match=match)
    refused("eval", folder, "--out", tmp_path, "--other-model", match=match)


def test_a_layer_that_the_model_lacks_is_refused(refused, copy, miniature, tmp_path):
    hook = f"model.layers.{miniature.n_layers}.output"
    folder = copy(hf_hook_point_in=hook, hf_hook_point_out=hook)
    match = f"{miniature.n_layers}.resid_post is not in .* 0 to {miniature.n_layers - 1}"
    refused("eval", folder, "--out", tmp_path, match=match)


def test_a_site_without_a_name_is_refused(refused, copy):
    refused(
        "info", copy(hf_hook_point_in="b.3", hf_hook_point_out="b.3"), match="no site is called 'b"
    )


def test_a_site_read_after_it_is_written_is_refused(refused, copy, miniature, tmp_path):
    last = f"model.layers.{miniature.n_layers - 1}.output"
    folder = copy(
        hf_hook_point_in=last, hf_hook_point_out="model.layers.0.output", type="transcoder"
    )
    match = "is computed after 0.resid_post"
    refused("eval", folder, "--tokens", 9, "--out", tmp_path, match=match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("<bos><eos>", "holds 0 tokens that count"),
        ("<bos>a<eos>", "holds 1 tokens that count"),
        (b"caf\xe9", "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\0", "is not UTF-8 text"),
    ],
)
def test_text_without_words_is_refused(refused, entry, file, tmp_path, content, match):
    refused("eval", entry.address, "--text", file(content), "--out", tmp_path, match=match)


@pytest.mark.parametrize(
    "text", ["", "no/such/file", "no/such/*.txt", "~nobody-here/x", "w " * 999]
)
def test_text_that_is_not_there_is_refused(refused, entry, text):
    refused("eval", entry.address, "--text", text, match="the text '' is empty|no text at '")


def test_text_comes_from_one_source(refused, entry, file):
    refused(
        "eval", entry.address, "--text", file("words"), "--dataset", "a/b",
        match="both --text and --dataset were given; give one",
    )  # fmt: skip


def test_a_data_set_needs_its_library(refused, entry, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("eval", entry.address, "--dataset", "a/b", match=r"pip install 'gemscope\[data\]'")


def test_a_report_that_cannot_be_written_is_told_before_the_work(refused, entry, file):
    refused("eval", entry.address, "--out", file("") / "sub", match="choose another --out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--tokens", "0"), "0 tokens cannot be evaluated on"),
        (("--tokens", "-5"), "-5 tokens cannot be evaluated on"),
        (("--context", "1"), "a context of 1 tokens has no room after BOS"),
        (("--context", "0"), "a context of 0 tokens has no room after BOS"),
        (("--batch", "0"), "a batch of 0 contexts"),
        (("--seed", "-1"), "seed -1 is not between"),
        (("--seed", str(2**64)), "is not between"),
        (("--device", "toaster"), "no device 'toaster' here"),
        (("--dtype", "float16"), "overflow float16; use bfloat16 or float32"),
        (("--dtype", "int8"), "no such dtype: 'int8'"),
        (("--model", "no/such/model"), "'no/such/model' is not the name of a model"),
    ],
)
def test_a_setting_out_of_range_is_refused(refused, entry, tmp_path, options, match):
    refused("eval", entry.address, *options, "--out", tmp_path, match=match)


def test_a_failed_evaluation_loses_nothing(command, refused, entry, file, tmp_path):
    out = tmp_path / "reports"
    small = ("--tokens", 50, "--context", 32, "--out", out)
    assert command("eval", entry.address, *small)[0] == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert before
    text = file("<eos>")
    refused("eval", entry.address, "--text", text, "--out", out, match="tokens that count")
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_reports_of_one_second_get_folders_of_their_own(tmp_path):
    from gemscope.evaluate import report_folder

    for _ in range(5):
        with report_folder(tmp_path / "reports", "evaluation") as folder:
            (folder / "report.md").touch()
    with report_folder(tmp_path / "reports", "evaluation"):
        pass  # nothing was written: nothing is left
    assert len(list((tmp_path / "reports").iterdir())) == 5


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "an empty text was given"),
        ("<bos><eos>", "holds only special tokens"),
        ("\udcff", "not valid Unicode"),
    ],
)
def test_a_look_at_nothing_is_refused(refused, entry, text, match):
    refused("look", text, "--sae", entry.address, match=match)


def test_a_look_at_more_than_a_context_is_refused(refused, entry, miniature):
    text = "a b " * miniature.max_context
    match = f"longer than the {miniature.max_context} tokens of one context"
    refused("look", text, "--sae", entry.address, match=match)


def test_a_look_draws_only_what_can_be_drawn(refused, entry, file, tmp_path):
    look = ("look", "import os", "--sae", entry.address)
    plot = ("--plot", tmp_path / "a.svg")
    refused(*look, "--feature", 3, match="give --plot FILE with it")
    refused(*look, "--plot", tmp_path / "a.bmp", match="not as 'a.bmp'")
    refused(*look, "--plot", file("") / "a.svg", match="cannot be written")
    for feature in (-1, entry.d_sae):
        match = f"no feature {feature}: .* 0 to {entry.d_sae - 1}"
        refused(*look, *plot, "--feature", feature, match=match)
    assert not (tmp_path / "a.svg").exists()


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def value(command):
    """The one JSON value that a command prints."""

    def run(*arguments):
        code, out, _ = command(*arguments, "--json")
        assert code == 0
        return json.loads(out, parse_constant=not_json)

    return run


def test_list_info_and_doctor_print_one_json_value(value, entries, kinds):
    rows = value("list", "--release", "miniature")
    assert [row["address"] for row in rows] == [e.address for e in entries]
    assert value("list", "no-such-word") == []
    for entry in kinds:
        facts = value("info", entry.address)
        assert facts["address"] == entry.address
        if entry.kind in ("sae", "transcoder"):
            assert facts["shapes"]["w_dec"] == [entry.d_sae, entry.d_out]
    doctor = value("doctor")
    assert doctor["problems"] == {}
    assert doctor["miniature"]["dictionaries"] == len(entries)


def test_look_prints_one_json_value(value, entry):
    seen = value("look", "import os\n", "--sae", entry.address, "--top", 2)
    assert "".join(seen["tokens"][1:]) == "import os\n"
    assert len(seen["features"]) == len(seen["tokens"])
    assert seen["features"][0] == []
    assert all(len(f) <= 2 for f in seen["features"])


def test_eval_prints_one_json_value_for_one_and_a_list_for_more(value, entry, copy, tmp_path):
    arguments = ("--tokens", 300, "--context", 64, "--out", tmp_path / "reports")
    one = value("eval", entry.address, *arguments)
    assert (one["address"], one["tokens"]) == (entry.address, 300)
    folder = copy()
    first, second = value("eval", entry.address, folder, *arguments)
    assert (first["address"], second["address"]) == (entry.address, str(folder))
    assert first["fvu"] == second["fvu"] == one["fvu"]
