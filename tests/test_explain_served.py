"""Asking a language-model server: answers, failures of every kind, and what is kept of them."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chat_server import ChatServer, Fault

from gemscope.errors import InputError
from gemscope.explain import Asker, Replies, Reply, Request, Served, Stopped, key_from
from gemscope.explain._chat import Halted

QUESTION = Request((("system", "Be brief."), ("user", "What?")), 50, purpose="a test")
KEY = "sk-abcdef0123456789"


@pytest.fixture
def server():
    with ChatServer(lambda messages: f"about {messages[-1]['content']}") as made:
        yield made


def chat(server, **options):
    return Served(server.url, "some-model", **({"pause": 0.01, "timeout": 0.5} | options))


def told(server, match, **options):
    with pytest.raises(InputError, match=match) as refused:
        chat(server, **options).answer(QUESTION)
    assert "\n" not in str(refused.value)
    assert KEY not in str(refused.value)
    return len(server.asked)


def test_what_is_asked_and_answered(server):
    reply = chat(server, key=KEY).answer(QUESTION)
    assert (reply.text, reply.finish) == ("about What?", "stop")
    assert (reply.tokens_in, reply.tokens_out) == (100, 7)
    assert datetime.fromisoformat(reply.created).tzinfo is not None
    (body,), (headers,) = server.asked, server.headers
    assert body == {
        "model": "some-model", "max_tokens": 50, "temperature": 0.0,
        "messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "What?"}],
    }  # fmt: skip
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in chat_headers(server)


def chat_headers(server):
    chat(server).answer(QUESTION)
    return server.headers[-1]


@pytest.mark.parametrize("kind", [429, 500, 503, "drop", "half", "page", "odd", 408])
def test_what_passes_is_asked_again(server, kind):
    server.faults = [Fault(kind), Fault(kind)]
    assert chat(server).answer(QUESTION).text == "about What?"
    assert len(server.asked) == 3


def test_a_slow_answer_is_asked_for_again(server):
    server.faults = [Fault("slow")]
    assert chat(server).answer(QUESTION).text == "about What?"


def test_a_pause_that_is_asked_for_is_made(server):
    for date in (False, True):
        began = time.time()
        # Dates are whole seconds, rounded down.
        soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        server.faults = [Fault(429, after=soon if date else 1)]
        chat(server).answer(QUESTION)
        assert time.time() - began >= 0.999


@pytest.mark.parametrize(
    ("fault", "match", "times"),
    [
        (Fault(429), r"asks for fewer requests \(429; --concurrency\) \(asked 6 times\); what was "
                     "answered is kept: run the same command again to go on", 6),
        (Fault(429, after=4000), r"again in 4000 s to go on", 1),
        (Fault(500), "fails with status 500", 6),
        (Fault("slow"), r"does not answer within 0.5 s \(--timeout\) \(asked 2 times\)", 2),
        (Fault("drip"), "does not answer within 0.5 s", 2),
        (Fault("page"), "answers with what is no chat completion", 3),
        (Fault("giant"), "answers with more than 4 MiB", 1),
        (Fault("drop"), "breaks off", 6),
        (Fault(401, says=f"Incorrect API key {KEY}"), "does not take the API key", 1),
        (Fault(404, says="no model some-model"), "no model some-model; give the base URL", 1),
        (Fault(400, says=f"too long\nfor {KEY}"), r"with status 400: too long for \.\.\.$", 1),
        (Fault("redirect"), "redirects to http://127.0.0.1:1/elsewhere: give the URL", 1),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_told_in_a_sentence(server, fault, match, times):
    server.always = fault
    assert told(server, match, key=KEY) == times


def test_a_server_that_is_not_there():
    with ChatServer(str) as gone:
        url = gone.url
    with pytest.raises(InputError, match=r"cannot be reached .*: is the server running"):
        Served(url, "m").answer(QUESTION)


def test_options_that_newer_models_do_not_take_are_left_out(server):
    says = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.faults = [Fault(400, says=says), Fault(400, says="'temperature' does not support 0.0")]
    one = chat(server)
    one.answer(QUESTION)
    assert {k: v for k, v in server.asked[-1].items() if k not in ("model", "messages")} == {
        "max_completion_tokens": 50
    }
    one.answer(QUESTION)
    assert len(server.asked) == 4, "it has learned"


@pytest.mark.parametrize(
    "url", ["ftp://a/v1", "localhost:8000", "http://", "http://a b/", "file:///etc/passwd"]
)
def test_no_urls(url):
    with pytest.raises(InputError, match="is no URL of a language-model server"):
        Served(url, "m")


@pytest.mark.parametrize("url", [f"http://me:{KEY}@a/v1", f"https://a/v1?key={KEY}", "http://a/#b"])
def test_urls_hold_no_secrets(url):
    with pytest.raises(InputError, match="must not hold a user, a password or a query") as refused:
        Served(url, "m")
    assert KEY not in str(refused.value)


def test_where_the_key_comes_from():
    held = {"OPENAI_API_KEY": KEY, "OTHER": " other "}
    assert key_from("https://a/v1", None, held) == KEY
    assert key_from("http://localhost:1/v1", None, held) == KEY
    assert key_from("http://elsewhere/v1", None, held) is None, "others could read it"
    assert key_from("http://elsewhere/v1", "OTHER", held) == "other"
    assert key_from("https://a/v1", None, {}) is None
    with pytest.raises(InputError, match="--key-env names GONE, and no such"):
        key_from("https://a/v1", "GONE", held)
    with pytest.raises(InputError, match="characters that no API key has"):
        key_from("https://a/v1", None, {"OPENAI_API_KEY": "a\r\nX: b"})


def asker(server, folder, **options):
    one = chat(server, **options)
    return Asker(one, Replies(folder, one.at, one.model))


def requests(count, start=0):
    return [Request((("user", f"{i}"),), 5) for i in range(start, start + count)]


def test_replies_are_kept_and_not_asked_for_again(server, tmp_path):
    first = asker(server, tmp_path)
    texts = [r.text for r in first.ask_all(requests(20))]
    assert texts == [f"about {i}" for i in range(20)]
    again = asker(server, tmp_path)
    assert first.ask_all(requests(20)) == again.ask_all(requests(20))
    assert len(server.asked) == 20
    assert (again.counts.asked, again.counts.kept) == (0, 20)
    other = Served(server.url, "another-model")
    assert Replies(tmp_path, other.at, other.model).find(requests(1)[0]) is None


def test_damaged_replies_are_asked_for_again(server, tmp_path):
    asker(server, tmp_path).ask_all(requests(5))
    (file,) = tmp_path.iterdir()
    lines = [line for line in file.read_bytes().split(b"\n") if line]
    assert len(lines) == 5
    # A crash in the middle of the last line; strange lines; a line that is JSON and no reply.
    file.write_bytes(b"\n".join([*lines[:4], b"\xff\xfe", b'{"key": 1}', b"[]", lines[4][:30]]))
    again = asker(server, tmp_path)
    assert [r.text for r in again.ask_all(requests(5))] == [f"about {i}" for i in range(5)]
    assert len(server.asked) == 6
    assert asker(server, tmp_path).ask_all(requests(5))[4].text == "about 4"
    assert len(server.asked) == 6


def test_a_full_disk_is_told(server, tmp_path, monkeypatch):
    one = asker(server, tmp_path)
    monkeypatch.setattr("os.write", lambda _handle, data: len(data) // 2)
    with pytest.raises(InputError, match="No space left on device; make room"):
        one.ask(requests(1)[0])


def test_no_more_at_a_time_than_allowed(server, tmp_path):
    server.pause = 0.02
    one = asker(server, tmp_path, concurrency=3)
    jobs = ((lambda part=part: one.ask_all(part)) for part in
            (requests(4, start) for start in range(0, 40, 4)))  # fmt: skip
    replies = [r for part in one.each(iter(jobs)) for r in part]
    assert {r.text for r in replies} == {f"about {i}" for i in range(40)}
    assert server.most == 3


def test_the_same_question_at_the_same_time_is_asked_once(server, tmp_path):
    server.pause = 0.05
    one = asker(server, tmp_path)
    assert [r.text for r in one.ask_all(requests(1) * 6)] == ["about 0"] * 6
    assert len(server.asked) == 1


def test_a_failure_ends_the_run_and_keeps_what_was_answered(server, tmp_path):
    server.faults = [*([None] * 6), *([Fault(401)] * 50)]
    one = asker(server, tmp_path, concurrency=2)
    with pytest.raises(InputError, match="API key"):
        list(one.each(iter([(lambda r=r: one.ask(r)) for r in requests(12)])))
    server.faults = []
    asked = len(server.asked)
    again = asker(server, tmp_path)
    assert len(again.replies) == 6
    again.ask_all(requests(12))
    assert len(server.asked) == asked + 6


def test_stopped_it_waits_for_what_is_under_way_and_no_longer(server, tmp_path):
    server.pause = 0.3
    one = asker(server, tmp_path, concurrency=2, timeout=30.0)
    one.stopping = lambda: len(server.asked) >= 2
    with pytest.raises(Stopped):
        list(one.each(iter([(lambda r=r: one.ask(r)) for r in requests(10)])))
    assert len(server.asked) == len(one.replies) == 2


def test_halted_it_hangs_up(server):
    server.pause = 20
    one = chat(server, timeout=60.0)
    threading.Timer(0.3, one.halt).start()
    began = time.monotonic()
    with pytest.raises(Halted):
        one.answer(QUESTION)
    assert time.monotonic() - began < 5


def test_the_key_of_a_request_is_everything_the_answer_depends_on():
    key = QUESTION.key("at", "model")
    assert len(key) == 64
    other = Request((("system", "Be brief."), ("user", "What?")), 50, purpose="another")
    assert other.key("at", "model") == key
    changed = [
        Request((("system", "Be brief."), ("user", "What!")), 50),
        Request(QUESTION.messages, 51),
        Request(QUESTION.messages, 50, temperature=0.1),
    ]
    keys = {r.key("at", "model") for r in changed} | {
        QUESTION.key("b", "model"),
        QUESTION.key("at", "c"),
    }
    assert len(keys | {key}) == 6


def test_a_reply_is_a_line_of_json(tmp_path):
    kept = Replies(tmp_path, "at", "a/model: 1")
    kept.keep(QUESTION, Reply("⏎ line\nbreak \u2028", created="2026-01-01T00:00:00+00:00"))
    assert kept.file.name.startswith("a-model-1-")
    (line,) = [row for row in kept.file.read_text("utf-8").split("\n") if row]
    row = json.loads(line)
    assert (row["text"], row["for"]) == ("⏎ line\nbreak \u2028", "a test")
