"""`gemscope harvest`: the verb over the store's writer."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gemscope.activations import open_store
from gemscope.cli._harvest import _sites
from gemscope.errors import InputError
from gemscope.sites import Site

BASE = ("harvest", "--model", "miniature", "--context", 64, "--memory-mb", 16)


def test_many_sites_in_one_pass(command, tmp_path):
    to = tmp_path / "store"
    code, out, err = command(
        *BASE, "--sites", "0-2,4.resid_post,3.mlp_in", "--tokens", 1_500, "--to", to
    )
    assert code == 0, err
    assert "harvesting" in err
    assert "1,500/1,500 tokens" in err
    assert f"The store: {to}" in out
    made = open_store(str(to), model_name="miniature", batch=100, seed=0)
    assert [str(site) for site in made.sites] == [
        "0.resid_post", "1.resid_post", "2.resid_post", "4.resid_post", "3.mlp_in",
    ]  # fmt: skip
    assert made.tokens == 1_500
    assert next(made.batches()).values[Site.parse("3.mlp_in")].shape == (100, 256)


def test_json_is_the_manifest_and_a_short_text_is_told(command, tmp_path, file):
    text = file("def area(width, height):\n    return width * height\n")
    arguments = (*BASE, "--text", text, "--sites", "0.resid_post", "--tokens", 10_000)
    code, out, _ = command(*arguments, "--to", tmp_path / "one", "--json", "--dtype", "int8")
    assert code == 0
    held = json.loads(out)
    assert held == json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert held["contents"]["dtype"] == "int8"
    code, out, _ = command(*arguments, "--to", tmp_path / "two")
    assert code == 0
    assert f"The text has {held['contents']['tokens']} tokens that count, not 10,000." in out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--sites": "0-2"}, r"--sites '0-2' does not end in a stream; write LAYERS.STREAM"),
        ({"--sites": "9.resid_post"}, r"9.resid_post is not in gemscope/miniature: its layers are"),
        ({"--sites": "1.resid"}, r"no stream named 'resid'; nearest: resid_pre"),
        (
            {"--dtype": "float16"},
            r"no such type of a store: 'float16'; use float32, bfloat16, int8",
        ),
        ({"--tokens": 0}, r"tokens is 0; take 1 or more"),
        ({"--memory-mb": 3}, r"memory-mb is 3; take 16 or more"),
        ({"--shard-mb": 0}, r"shard-mb is 0; take 1 or more"),
        ({"--context": 600}, r"--context is 600, and miniature reads at most 512"),
        ({"--to": "x9://a"}, r"x9://a cannot be opened"),
        ({"--dataset": "some/data"}, r"both --text and --dataset were given; give one"),
    ],
)
def test_mistakes(refused, tmp_path, changes, told):
    options = {
        "--sites": "0.resid_post", "--tokens": 100, "--to": tmp_path / "to", "--context": 64,
        "--text": "miniature",
    } | changes  # fmt: skip
    refused("harvest", "--model", "miniature", *(p for o in options.items() for p in o), match=told)


def test_other_peoples_folders_are_left_alone(refused, command, tmp_path):
    arguments = (*BASE, "--sites", "0.resid_post", "--tokens", 200, "--to")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    refused(*arguments, tmp_path / "mine", match="is not empty, and nothing in .* says that a")
    (tmp_path / "file").write_text("words")
    refused(*arguments, tmp_path / "file", match="Not a directory")
    (tmp_path / "empty").mkdir()
    assert command(*arguments, tmp_path / "empty")[0] == 0
    refused(*arguments, tmp_path / "empty", match="is a finished store; choose another place")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_to_go_on(command, tmp_path, signum):
    arguments = [*map(str, BASE), "--sites", "0-5.resid_post"]
    arguments += ["--tokens", "60000", "--to", str(tmp_path / "store")]
    started = subprocess.Popen(
        [sys.executable, "-m", "gemscope", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    progress = tmp_path / ".store.harvest" / "progress.json"
    while not progress.is_file() or not json.loads(progress.read_text())["batches"]:
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signum)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 128 + signum
    assert "tokens; what is written is kept: run the same command to go on" in err
    assert "Traceback" not in err
    assert json.loads(progress.read_text())["tokens"] > 0


def test_sites_are_written_as_everywhere():
    assert list(map(str, _sites("1.resid_post, 1.resid_post,0.mlp_in"))) == [
        "1.resid_post", "0.mlp_in",
    ]  # fmt: skip
    for text in ("", "1", "1.resid_post,", "1.resid_post,,2.mlp_in"):
        with pytest.raises(InputError):
            _sites(text)
