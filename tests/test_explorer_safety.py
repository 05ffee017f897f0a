"""Who is answered, what is refused, and what becomes of readers that leave."""

import asyncio
import http.client
import os
import socket
from urllib.parse import quote, urlsplit

import pytest
from explorer import served
from fastapi.testclient import TestClient

from gemscope import hub
from gemscope.errors import InputError
from gemscope.explorer import Access, Limits, Workbench, create_app
from gemscope.explorer._security import Guard
from gemscope.explorer._worker import Busy
from gemscope.features import Store

TOKEN = "sixteen-letters-and-more"


def asked(address, path="/static/app.js", *, method="GET", headers=(), body=None):
    """Status, headers and body of one request on a socket, with the headers as given."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {"Host": where.netloc, **dict(headers)}
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    read = answer.status, answer.headers, answer.read().decode("utf-8", "replace")
    connection.close()
    return read


@pytest.fixture(scope="module")
def local(small_store):
    with served(small_store) as address:
        yield address


@pytest.fixture(scope="module")
def shared(small_store):
    with served(small_store, access=Access(hosts=(), token=TOKEN)) as address:
        yield address


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "a b", "192.0.2.7"],
)
def test_other_hosts_are_not_answered(local, host):
    status, headers, _ = asked(local, headers={"Host": host})
    assert status in (400, 421)
    if status == 421:
        assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_own_names_are_answered(local, host):
    port = urlsplit(local).port
    assert asked(local, headers={"Host": f"{host}:{port}"})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://[oops"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_other_sites_are_refused(local, headers):
    assert asked(local, headers=headers)[0] == 403


def test_a_link_from_another_site_is_followed(local):
    headers = {"Site": "cross-site", "Mode": "navigate", "Dest": "document"}
    headers = {f"Sec-Fetch-{name}": value for name, value in headers.items()}
    assert asked(local, "/scope", headers=headers)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "MADE-UP"])
def test_writing_needs_the_token_of_a_page(local, method):
    status, _, body = asked(local, "/api/scope", method=method, headers={"X-Gemscope": "guessed"})
    assert (status, "X-Gemscope" in body) == (403, True)


def test_the_token_is_asked_for_and_leaves_the_address(shared):
    assert asked(shared)[0] == 401
    assert asked(shared, "/static/app.js?token=wrong")[0] == 401
    assert asked(shared, headers={"Cookie": "gemscope=wr\xf6ng"})[0] == 401
    status, headers, _ = asked(shared, f"/scope?release=miniature&token={TOKEN}")
    assert (status, headers["Location"]) == (303, "/scope?release=miniature")
    assert "HttpOnly" in headers["Set-Cookie"]
    assert "SameSite=strict" in headers["Set-Cookie"]
    held = {"Cookie": f"other=1; gemscope={TOKEN}", "Host": "any.name"}
    assert asked(shared, headers=held)[0] == 200


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "///evil.example"])
def test_the_token_sends_nobody_elsewhere(shared, path):
    _, headers, _ = asked(shared, f"{path}?token={TOKEN}")
    assert headers["Location"].startswith("/evil.example")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../_app.py", "/static/..%2f_app.py", "/static/%2e%2e/_app.py",
        "/static//etc/passwd",
        "/static/..\\_app.py", "/static/vendor/../../_app.py", "/static/%00", "/static/",
    ],
)  # fmt: skip
def test_static_files_are_those_of_the_folder(local, path):
    status, _, body = asked(local, path)
    assert status in (404, 405), path
    assert "import" not in body


def test_every_answer_has_its_headers(local):
    for path in ("/scope", "/static/app.js", "/api/scope", "/nothing", "/api/scope?release=none"):
        _, headers, _ = asked(local, path)
        policy = headers["Content-Security-Policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-inline" not in policy.partition("style-src")[0]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def page_token(address):
    _, _, body = asked(address, "/scope")
    return body.partition('name="gemscope-token" content="')[2].partition('"')[0]


def test_large_requests_are_refused(local):
    headers = {"X-Gemscope": page_token(local), "Content-Type": "application/json"}
    size = Limits().body + 1
    said = asked(
        local, "/api/scope", method="POST", headers=headers | {"Content-Length": str(size)}
    )
    assert said[0] == 413
    # Without a length beforehand it is counted as it comes.
    where = urlsplit(local)
    with socket.create_connection((where.hostname, where.port), timeout=30) as stream:
        lines = [f"POST /api/echo HTTP/1.1\r\nHost: {where.netloc}\r\nTransfer-Encoding: chunked"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        stream.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
        piece = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
        try:
            for _ in range(8):
                stream.sendall(piece)
        except OSError:
            pass  # it has stopped listening, as it may
        # A page that reads no body answers that it is not there before all has come.
        assert stream.recv(100).split()[1] in (b"413", b"404", b"405")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/scope?q=" + "x" * Limits().body, {}, 414),
        ("/scope", {"X-Long": "x" * 70_000}, 431),
        ("/scope?q=" + "x" * 2**20, {}, 431),
        ("/scope", {"X-Long": "x" * 2**20}, 431),
    ],
)  # fmt: skip
def test_what_is_too_long_is_told_so(local, path, headers, status):
    for _ in range(3):  # with bytes unread an answer may be lost, and may not
        said = asked(local, path, headers=headers)
        assert said[0] == status
        assert "bytes" in said[2]
        assert "refused" in said[2]


def test_what_is_no_request_is_told_so(local):
    where = urlsplit(local)
    with socket.create_connection((where.hostname, where.port), timeout=30) as stream:
        stream.sendall(b"good day\r\n\r\n" + b"x" * 200_000)
        said = b"".join(iter(lambda: stream.recv(65_536), b""))
    assert said.startswith(b"HTTP/1.1 400")
    assert b"this is no HTTP request" in said


def test_a_text_as_long_as_is_read_fits_an_address(local):
    status, _, body = asked(local, f"/api/look?text={quote('字' * Limits().characters)}")
    assert status == 422
    assert "tokens" in body


def guarded(answer, access=Access(), body=1_000):
    """A client of an app behind the guard."""
    return TestClient(Guard(answer, access, body), base_url="http://localhost")


def test_a_body_that_grows_is_cut_off():
    seen = []

    async def reads(scope, receive, send):
        while True:
            message = await receive()
            seen.append(len(message.get("body", b"")))
            if not message.get("more_body"):
                break

    access = Access()
    answer = guarded(reads, access).post(
        "/", content=iter([b"x" * 600] * 3), headers={"X-Gemscope": access.page_token}
    )
    assert answer.status_code == 413
    assert sum(seen) <= 1_000


def test_work_of_a_reader_who_left_is_cancelled():
    async def scene():
        ended = asyncio.Event()

        async def slow(scope, receive, send):
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        messages = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        scope = {
            "type": "http", "method": "GET", "path": "/", "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip

        async def send(message):
            raise AssertionError("nobody is there")

        call = asyncio.create_task(Guard(slow, Access(), 10)(scope, messages.get, send))
        await asyncio.sleep(0.05)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(call, 5)
        assert ended.is_set()

    asyncio.run(scene())


def test_other_protocols_are_closed():
    async def nothing(scope, receive, send):
        raise AssertionError("not for this app")

    async def scene():
        sent = []

        async def send(message):
            sent.append(message["type"])

        await Guard(nothing, Access(), 10)({"type": "websocket"}, None, send)
        assert sent == ["websocket.close"]

    asyncio.run(scene())


def test_a_full_queue_is_told_with_when_to_come_back(small_store):
    bench = Workbench([Store.open(small_store)])
    app = create_app(bench)

    @app.get("/api/full")
    async def full():
        raise Busy

    @app.get("/api/half")
    async def half():
        raise InputError("half a character: \ud800")

    with TestClient(app, base_url="http://localhost") as client:
        answer = client.get("/api/full")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        answer = client.get("/api/half")
        assert (answer.status_code, "half a character" in answer.json()["detail"]) == (422, True)


# Addresses from an URL.


@pytest.fixture(scope="module")
def bench(small_store):
    return Workbench([Store.open(small_store)])


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that would ask for anything outside, or read a dictionary's folder."""

    def refused(*arguments, **named):
        raise AssertionError(f"would connect: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE")


OUTSIDE = ("owner/repo/path", "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "")


@pytest.mark.parametrize("address", OUTSIDE)
def test_an_address_fetches_nothing(bench, no_network, address):
    with pytest.raises(InputError, match="neither indexed"):
        bench.dictionary(address)


def test_an_address_reads_no_folder(bench, entry):
    for address in (str(entry.path), os.path.relpath(entry.path), "~", "."):
        with pytest.raises(InputError, match="neither indexed"):
            bench.dictionary(address)


def test_a_catalogued_artefact_that_is_not_here_is_not_fetched(bench, no_network, monkeypatch):
    monkeypatch.setattr(hub, "build", lambda entry: pytest.fail("would be fetched"))
    address = hub.catalog(release="gemma-scope-2b-pt-res")[0].address
    with pytest.raises(InputError, match=f"not here: gemscope download {address}"):
        bench.dictionary(address)


def test_another_model_is_not_loaded(bench, no_network):
    for name in ("google/gemma-2-2b", "/etc", "owner/name"):
        with pytest.raises(InputError, match="no model of this server"):
            bench.model(name)


PAGES = (
    "/feature/{}/0", "/map/{}", "/?sae={}&text=a", "/steer?feature={}/0&prompt=a",
    "/compare?sae={}", "/search?dictionary={}&q=a", "/scope?at={}", "/api/scope?release={}",
)  # fmt: skip


@pytest.mark.parametrize("part", PAGES)
def test_no_page_takes_an_address_from_outside(local, entry, part):
    for address in (str(entry.path), *OUTSIDE[:2]):
        status, _, body = asked(local, part.format(quote(address)))
        assert status < 500, (part, address)
        assert "params.safetensors" not in body


# The command.


def test_others_need_a_token(refused):
    refused("serve", "--host", "0.0.0.0", match="others can reach")
    refused("serve", "--host", "0.0.0.0", "--token", "short", match="can be guessed")


def test_a_port_that_is_taken(refused, small_store):
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused("serve", small_store, "--port", other.getsockname()[1], match="cannot listen")


def test_what_is_no_store_is_refused(refused, tmp_path, small_store):
    refused("serve", tmp_path, "--port", "0", match="no catalog store")
    refused("serve", small_store, "--port", 0, "--reports", tmp_path / "no", match="no folder")
