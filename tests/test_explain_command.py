"""`gemscope explain`: what it prints and refuses, and that nothing that was answered is lost."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from chat_oracle import Oracle
from chat_server import ChatServer, Fault

from gemscope.cli._explain import parse_features
from gemscope.errors import InputError
from gemscope.features import Note, Store

FEATURES = (3, 4, 8, 16, 23, 24)
KEY = "sk-verysecret0123456789"


@pytest.fixture(scope="session")
def oracle(small_store, indexed):
    return Oracle(small_store, indexed[0], FEATURES)


@pytest.fixture
def server(oracle, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(oracle) as made:
        yield made


@pytest.fixture
def arguments(own_store, indexed, server):
    numbers = ",".join(map(str, FEATURES))
    return ("explain", own_store, indexed[0], "--features", numbers, "--by", server.url,
            "--model", "some-model", "--judged", 10)  # fmt: skip


def explained(folder):
    """What the store holds, but for the time and the port of the test's server."""
    rows = Store.open(folder).explanations()
    return [replace(e, created="", detail={**e.detail, "at": ""}) for e in rows]


def kept(folder):
    (file,) = (folder / "replies").iterdir()
    return [json.loads(line)["key"] for line in file.read_text("utf-8").split("\n") if line]


def test_labels_and_scores_are_printed_and_stored(command, arguments, own_store, server):
    code, out, err = command(*arguments, "--price-in", "2", "--price-out", "3")
    assert code == 0, err
    assert "6 feature(s) explained" in out
    assert "23      1  feature number 23" in out
    said = server.asked
    assert f"About {len(said)} requests to some-model ({server.url})" in err
    assert f"{len(said)} requests (0 more were answered already)" in out
    assert {e.text for e in explained(own_store)} == {f"feature number {f}" for f in FEATURES}
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    (one,) = found["dictionaries"]
    assert (found["requests"], found["kept"]) == (0, len(said))
    assert len(server.asked) == len(said)
    assert [e["feature"] for e in one["explanations"]] == list(FEATURES)
    assert one["scores"]["detection"]["mean"] == 1.0
    assert one["scores"]["detection"]["judged"] == sum(
        e["scores"][0]["n"] for e in one["explanations"]
    )


def test_a_dry_run_asks_nothing(command, arguments, server, own_store):
    code, out, _ = command(*arguments, "--dry-run", "--price-in", "1.5")
    assert code == 0
    assert out.startswith("About ")
    assert "at these prices" in out
    code, out, _ = command(*arguments, "--dry-run", "--json", "--price-in", "1000000")
    found = json.loads(out)
    assert found["price"] == found["tokens_in"] > 1_000
    assert (server.asked, explained(own_store)) == ([], [])


def test_the_key_is_sent_and_nowhere_else(command, arguments, server, own_store, monkeypatch):
    monkeypatch.setenv("MINE", KEY)
    code, out, err = command(*arguments, "--key-env", "MINE", "--json", "--score", "none")
    assert code == 0, err
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    server.always = Fault(400, says=f"bad key {KEY}")
    _, out2, err2 = command(*arguments, "--key-env", "MINE")
    assert "status 400" in err2
    assert KEY not in out + err + out2 + err2
    for file in own_store.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_killed_and_run_again_it_ends_as_if_never_killed(arguments, command, server, tmp_path):
    whole, own = tmp_path / "whole", arguments[1]
    shutil.copytree(own, whole)
    assert command("explain", whole, *arguments[2:], "--concurrency", 1)[0] == 0
    everything, asked = explained(whole), len(server.asked)
    server.asked.clear()
    server.pause = 0.05
    started = subprocess.Popen(
        [sys.executable, "-m", "gemscope", *map(str, arguments), "--concurrency", "3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while len(server.asked) < asked // 2:
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    started.kill()
    started.communicate()
    before = kept(own)
    assert 0 < len(before) < asked
    with next((own / "replies").iterdir()).open("ab") as file:
        file.write(b'\n{"key": "half a li')  # what a power cut leaves
    server.pause, first = 0.0, len(server.asked)
    code, _, err = command(*arguments)
    assert code == 0, err
    assert explained(own) == everything
    # Asked again is only what was not answered yet: the three that were under way at most.
    assert len(server.asked) - first == asked - len(before)
    assert sum(n - 1 for n in Counter(server.keys()).values()) <= 3
    file = next((own / "replies").iterdir()).read_text("utf-8").split("\n")
    whole_lines = [line for line in file if line and "half a li" not in line]
    assert len({json.loads(line)["key"] for line in whole_lines}) == len(whole_lines) == asked


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_to_go_on(arguments, own_store, server, signum):
    server.pause = 0.1
    started = subprocess.Popen(
        [sys.executable, "-m", "gemscope", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(server.asked) < 12:
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    started.send_signal(signum)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 128 + signum, err
    assert err.endswith(
        "gemscope: stopped; what was answered is kept: run the same command to go on\n"
    )
    assert "Traceback" not in err
    assert len(kept(own_store)) == len(server.asked), "even what was under way"


@pytest.mark.parametrize(
    ("fault", "options", "match"),
    [
        (Fault(429, after=500), (), "asks for fewer requests .* again in 500 s to go on"),
        (Fault("slow"), ("--timeout", "0.2"), r"does not answer within 0.2 s"),
        (Fault("giant"), (), "answers with more than 4 MiB"),
        (Fault(401), (), "does not take the API key"),
        (Fault(404), (), "is not there, or the model 'some-model' is not"),
    ],
)
def test_a_server_that_fails_is_told_and_nothing_is_lost(
    command, arguments, own_store, server, fault, options, match
):
    assert command(*arguments, "--score", "none", "--features", "3,4")[0] == 0
    asked, before = len(server.asked), explained(own_store)
    server.always = fault
    code, out, err = command(*arguments, "--score", "none", "--concurrency", 1, *options)
    assert (code, out) == (2, "")
    assert re.search(rf"^gemscope: .*{match}.*\n\Z", err, re.M), err
    assert explained(own_store) == before
    server.always = None
    assert command(*arguments, "--score", "none")[0] == 0
    assert len(explained(own_store)) == len(FEATURES)
    assert len(kept(own_store)) == len(FEATURES)
    assert asked == 2


def test_nonsense_is_told(command, arguments, own_store, server):
    server.answer = lambda _: "Let me see.\nThe tokens are ..."
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert "some-model gave no usable label for any of 6 feature(s)" in last
    assert "it has more than one line" in last
    assert len(kept(own_store)) == 12
    assert explained(own_store) == []


def test_nonsense_for_judgement_is_told_and_the_labels_stay(
    command, arguments, own_store, oracle, server
):
    server.answer = lambda m: "perhaps" if "The list of" in m[-1]["content"] else oracle(m)
    code, _, err = command(*arguments)
    assert code == 2
    assert "some-model answered none of 12 score(s) with a list" in err
    assert len(explained(own_store)) == 6


def test_a_note_keeps_a_feature_from_being_explained(
    command, arguments, own_store, indexed, server
):
    note = Note(dictionary=indexed[0], feature=8, text="mine", author="me")
    Store.open(own_store).add_notes([note])
    code, out, _ = command(*arguments, "--score", "none")
    assert code == 0
    assert "1 left out, as a person has a note on them (--all)" in out
    assert 8 not in {e.feature for e in explained(own_store)}
    code, out, _ = command(*arguments, "--score", "none", "--all", "--json")
    assert 8 in {e.feature for e in explained(own_store)}
    assert Store.open(own_store).notes() == [note]


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["n", "y"])
def test_before_the_first_request_it_asks(arguments, server, answer):
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-m", "gemscope", *map(str, arguments), "--score", "none"],
        stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"Begin?" not in said:
        said += os.read(ours, 1_000)
    assert b"About 6 requests to some-model" in said
    assert server.asked == []
    os.write(ours, f"{answer}\n".encode())
    out, _ = started.communicate(timeout=60)
    os.close(ours)
    assert started.returncode == 0
    assert len(server.asked) == (6 if answer == "y" else 0)
    assert bool(out) == (answer == "y")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (("--by", "gpt"), "--by 'gpt' is nobody who explains: give rules, transformers"),
        (("--by", "http://x/v1"), "--by http://x/v1 needs --model NAME"),
        (("--by", "http://u:p@x/v1", "--model", "m"), "must not hold a user"),
        (("--model", "m"), "--model and --dry-run are for a language model"),
        (("--features", "1-b"), "no features '1-b': give numbers and ranges"),
        (("--features", "9-3"), "no features '9-3': a range begins with the smaller"),
        (("--features", "0-384"), "no feature 384: .* has 0 to 383"),
        (("--score", "detecton"), "no score 'detecton'; nearest: detection"),
        (("--score-only",), "--score-only needs --score"),
        (("--score-only", "--score", "fuzzing"), "no explanations of these features to score"),
        (("--limit", "0"), "limit is 0; take 1 or more"),
        (("--window", "1"), "window is 1; take 4 to 512"),
        (("miniature/resid_post_all/layer_9",), "layer_9 is not indexed in"),
    ],
)
def test_mistakes(refused, own_store, changes, match):
    refused("explain", own_store, *changes, match=match)


def test_rules_need_the_activations(refused, own_store):
    shutil.rmtree(own_store / "activations")
    refused("explain", own_store, match="was indexed without keeping its activations, from which")


@pytest.mark.slow
def test_rules_are_learned_and_applied(command, own_store, indexed):
    options = ("explain", own_store, indexed[0], "--features", "8,23-25", "--score", "detection")
    code, out, err = command(*options)
    assert code == 0, err
    assert "4 feature(s) explained" in out
    assert "on documents they were not learned on" in out
    code, again, err = command(*options, "--score-only", "--json")
    assert code == 0, err
    (found,) = json.loads(again)["dictionaries"]
    assert [e["feature"] for e in found["explanations"]] == [8, 23, 24, 25]
    assert found["scores"].keys() == {"rule", "simulation", "detection"}
    assert found["scores"]["detection"]["null"] < found["scores"]["detection"]["mean"]


def test_codes_for_terminals_are_not_printed(command, own_store, indexed):
    from gemscope.features import Explanation

    row = Explanation(dictionary=indexed[0], feature=23, text="\x1b[31mred", method="imported",
                      author="them")  # fmt: skip
    Store.open(own_store).add_explanations([row])
    with ChatServer(lambda _: "[1]") as server:
        code, out, err = command(
            "explain", own_store, "--by", server.url, "--model", "m", "--score-only", "--score",
            "detection", "--per-prompt", 1, "--judged", 4,
        )  # fmt: skip
    assert code == 0, err
    assert "[31mred" in out
    assert "\x1b" not in out


def test_what_is_no_store(refused, tmp_path):
    refused("explain", tmp_path / "nothing", match="no catalog store at")


def test_ranges_of_features():
    assert parse_features("0-3, 7,5") == [0, 1, 2, 3, 7, 5]
    assert parse_features(None) is None
    for text in ("", "a", "-1", "1-2-3", "1,,2", "1" * 20, "١"):
        with pytest.raises(InputError):
            parse_features(text)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A model of transformers that says anything, with a chat template and a long context."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    from gemscope.hub import model_source

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(model_source("miniature"))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system turn') }}{% endif %}"
        "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4_096,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_in_this_process_is_asked_and_its_nonsense_told(
    command, arguments, own_store, babbler
):
    options = ("--by", "transformers", "--model", babbler, "--max-tokens", 12, "--device", "cpu",
               "--features", "3,4", "--examples", 4)  # fmt: skip
    code, out, err = command(*arguments, *options)
    assert (code, out) == (2, ""), err
    # By chance what it says may pass for a label; to judge by it, never.
    assert re.search(r"gave no usable label for any of 2|answered none of \d+ score", err)
    assert "Token indices" not in err
    answers = kept(own_store)
    assert len(answers) >= 2
    assert command(*arguments, *options)[0] == 2
    assert kept(own_store) == answers, "nothing is asked twice"


def test_a_prompt_that_does_not_fit_is_told(command, arguments):
    code, _, err = command(
        *arguments, "--by", "transformers", "--model", "miniature", "--device", "cpu"
    )
    assert code == 2
    assert "miniature reads 512 tokens, and a prompt has " in err
    assert "take another model, or smaller --examples, --window or --max-tokens" in err
