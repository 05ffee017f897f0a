"""A language-model server on this machine: the protocol of chat completions, and all that can go
wrong with one. It is the third party; what is tested is who asks it.

    with ChatServer(lambda messages: "Label: a word") as server:
        server.faults = [Fault(429, after=0)]   # of the next requests, in order
        subprocess.run([... "--by", server.url ...])
        server.asked
"""

import json
import threading
import time
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """A status, or one of `slow`, `drip`, `drop`, `half`, `page`, `giant`, `odd`, `redirect`."""

    kind: int | str
    after: int | str | None = None
    """`Retry-After`."""
    says: str = ""
    """The message of the error."""


class ChatServer:
    def __init__(self, answer):
        self.answer = answer
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.asked: list[dict] = []
        """Bodies of the requests, in the order they came."""
        self.headers: list[dict] = []
        self.most = self.now = 0
        """Requests at the same time: the most there were, and how many there are."""
        self.pause = 0.0
        self.lock = threading.Lock()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def keys(self):
        """The conversations that were asked, as JSON."""
        return [json.dumps(body["messages"]) for body in self.asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server, *arguments):
        self.of = server
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(405, b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.of.lock:
            self.of.asked.append(body)
            self.of.headers.append({k.lower(): v for k, v in self.headers.items()})
            self.of.now += 1
            self.of.most = max(self.of.most, self.of.now)
            fault = self.of.faults.pop(0) if self.of.faults else self.of.always
        try:
            time.sleep(self.of.pause)
            if self.path != "/v1/chat/completions":
                self._send(404, b"nothing here")
            elif fault is None:
                self._send(200, completion(self.of.answer(body["messages"])))
            else:
                self._fail(fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.of.lock:
                self.of.now -= 1

    def _fail(self, fault):
        after = {} if fault.after is None else {"Retry-After": str(fault.after)}
        if isinstance(fault.kind, int):
            said = (
                json.dumps({"error": {"message": fault.says}}).encode() if fault.says else b"<h1>"
            )
            self._send(fault.kind, said, after)
        elif fault.kind == "redirect":
            self._send(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"})
        elif fault.kind == "slow":
            time.sleep(3)
            self.close_connection = True
        elif fault.kind == "drop":
            self.close_connection = True
        elif fault.kind == "page":
            self._send(200, b"<html>Log in to this network")
        elif fault.kind == "odd":
            self._send(200, b'{"choices": [{"message": {"content": {"a": 1}}}]}')
        elif fault.kind == "half":
            self._send(200, completion("Label: half"), cut=20)
        elif fault.kind == "drip":
            self._start(200, 10**6)
            for _ in range(60):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        elif fault.kind == "giant":
            self._start(200, 10**9)
            for _ in range(8):
                self.wfile.write(b" " * 2**20)
        else:
            raise AssertionError(fault)

    def _start(self, status, size, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status, content, headers=None, cut=0):
        self._start(status, len(content), headers)
        self.wfile.write(content[: len(content) - cut])
        if cut:
            self.close_connection = True


def completion(text):
    """An answer as servers give it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    body = {"choices": [choice | {"finish_reason": "stop"}], "usage": usage}
    return json.dumps(body).encode()
