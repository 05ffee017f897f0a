"""A language model behind an OpenAI-compatible URL, by the standard library alone."""

import email.utils
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from gemscope.errors import InputError

from ._chat import Halted, Reply, Request

_MOST_BYTES = 4 * 2**20
"""Of an answer that is read."""
_LONGEST_PAUSE = 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Served:
    """Chat completions at `{url}/chat/completions`, repeated where that can help."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 6,
        pause: float = 1.0,
    ):
        """`pause` is the first wait in seconds before a repetition; each next one is doubled."""
        self.at, self.model = _base(url), model
        self.concurrency, self.timeout, self.tries, self.pause = concurrency, timeout, tries, pause
        self._key = key
        self._halted = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._renamed: dict[str, str | None] = {}
        self._opener = urllib.request.build_opener(
            _Plain(self._sockets), _Secure(self._sockets), _NoRedirect()
        )

    def halt(self) -> None:
        """End pauses and close connections."""
        self._halted.set()
        for one in list(self._sockets):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already

    def answer(self, request: Request) -> Reply:
        """Continue a conversation; busy and broken servers are asked again, for a while."""
        turn = 0
        while True:
            if self._halted.is_set():
                raise Halted
            try:
                return self._once(request)
            except _Trouble as trouble:
                turn += 1
                if turn >= min(self.tries, trouble.tries) or trouble.after > _LONGEST_PAUSE:
                    raise self._over(trouble, turn) from None
                self._wait(turn, trouble.after)

    def _over(self, trouble: "_Trouble", turn: int) -> InputError:
        times = f" (asked {turn} times)" if turn > 1 else ""
        pause = f" in {trouble.after:.0f} s" if trouble.after > _LONGEST_PAUSE else ""
        return InputError(
            f"{self.at} {trouble}{times}; what was answered is kept: run the same command "
            f"again{pause} to go on"
        )

    def _wait(self, turn: int, after: float) -> None:
        # Waits spread out, or all that were refused together would come back together.
        wait = self.pause * 2 ** (turn - 1) * random.uniform(0.5, 1.0)  # noqa: S311
        if self._halted.wait(min(max(after, wait), _LONGEST_PAUSE)):
            raise Halted

    def _once(self, request: Request) -> Reply:
        try:
            with self._opener.open(self._posted(request), timeout=self.timeout) as response:
                return _reply(self._read(response))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException) as error:
            if self._halted.is_set():
                raise Halted from None
            raise self._unreachable(error) from None

    def _posted(self, request: Request) -> urllib.request.Request:
        fields: dict[str, Any] = {"max_tokens": request.max_tokens}
        fields["temperature"] = request.temperature
        for name, new in list(self._renamed.items()):
            value = fields.pop(name, None)
            if new is not None:
                fields[new] = value
        messages = [{"role": role, "content": content} for role, content in request.messages]
        body = json.dumps({"model": self.model, "messages": messages, **fields})
        post = urllib.request.Request(  # noqa: S310
            f"{self.at}/chat/completions",
            body.encode(),
            {"Content-Type": "application/json", "Accept": "application/json"},
        )
        if self._key:
            post.add_unredirected_header("Authorization", f"Bearer {self._key}")
        return post

    def _read(self, response: Any) -> bytes:
        """The body; what trickles in may not take longer than the timeout in all."""
        ends, parts, size = time.monotonic() + self.timeout, [], 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise InputError(
                    f"{self.at} answers with more than {_MOST_BYTES >> 20} MiB, which is no chat "
                    "completion; check the URL and the model"
                )
            if time.monotonic() > ends:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an error status means: a `_Trouble` that may pass, or the end."""
        status = error.code
        if status in (408, 409, 425, 429) or status >= 500:
            says = "asks for fewer requests (429; --concurrency)" if status == 429 else (
                f"fails with status {status}")  # fmt: skip
            return _Trouble(says, _seconds(error.headers))
        try:
            said = self._told(error.read1(2**16).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            said = ""
        if status in (401, 403):
            return InputError(
                f"{self.at} does not take the API key ({status}): set OPENAI_API_KEY, or name "
                "another variable with --key-env"
            )
        if 300 <= status < 400:
            to = self._told(str(error.headers.get("Location", "elsewhere")))
            return InputError(f"{self.at} redirects to {to}: give the URL it is really at")
        if status == 404:
            return InputError(
                f"{self.at}/chat/completions is not there, or the model {self.model!r} is not"
                f"{f': {said}' if said else ''}; give the base URL, such as "
                "http://localhost:8000/v1, and --model"
            )
        if status == 400 and self._rename(said):
            return _Trouble("does not take the options of the request")
        return InputError(f"{self.at} refuses the request with status {status}"
                          f"{f': {said}' if said else ''}")  # fmt: skip

    def _rename(self, said: str) -> bool:
        """Newer models want another name for the limit, and no temperature: whether that is new."""
        before = dict(self._renamed)
        if "max_completion_tokens" in said:
            self._renamed["max_tokens"] = "max_completion_tokens"
        if "temperature" in said:
            self._renamed["temperature"] = None
        return before != self._renamed

    def _told(self, body: str) -> str:
        """The first line of what a server says, without the key, should it repeat it."""
        try:
            found = json.loads(body)
            found = found.get("error", found.get("message", ""))
            body = str(found.get("message", "") if isinstance(found, dict) else found)
        except (ValueError, AttributeError, RecursionError):
            body = re.sub(r"<[^>]*>", " ", body)
        if self._key:
            body = body.replace(self._key, "...")
        line = re.sub(r"[^\x20-\x7e\u00a0-\U0010ffff]+|\s+", " ", body).strip()
        return line if len(line) <= 200 else f"{line[:200]}..."

    def _unreachable(self, error: Exception) -> Exception:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return _Trouble(f"does not answer within {self.timeout:g} s (--timeout)", tries=2)
        if isinstance(reason, ConnectionRefusedError | socket.gaierror):
            return InputError(
                f"{self.at} cannot be reached ({reason.strerror}): is the server running? What was "
                "answered is kept: run the same command again to go on"
            )
        what = self._told(str(getattr(reason, "strerror", None) or type(reason).__name__))
        return _Trouble(f"breaks off ({what})")


class _Trouble(Exception):  # noqa: N818
    """Something that may be better the next time."""

    def __init__(self, says: str, after: float = 0.0, tries: int = 100):
        """`after`: seconds to wait at least; `tries`: so often it is worth asking in all."""
        super().__init__(says)
        self.after, self.tries = after, tries


def _base(url: str) -> str:
    """The URL up to what is asked there; refused where it could hold a secret or a file."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise InputError(
            f"{url!r} is no URL of a language-model server; give its base, such as "
            "http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "a URL must not hold a user, a password or a query, for it is stored with the "
            "explanations; give the key in an environment variable (--key-env)"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def key_from(url: str, name: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The API key for a server: of the variable `name`, or of OPENAI_API_KEY if there is one.

    That one is not sent unasked over a connection that others could read.
    """
    parts = urlsplit(url)
    if name is not None:
        if not environment.get(name):
            raise InputError(f"--key-env names {name}, and no such environment variable is set")
        found = environment[name]
    elif parts.scheme != "https" and parts.hostname not in _LOOPBACK:
        return None
    else:
        found = environment.get("OPENAI_API_KEY", "")
    if not re.fullmatch(r"[\x21-\x7e]*", found.strip()):
        raise InputError(f"{name or 'OPENAI_API_KEY'} holds characters that no API key has")
    return found.strip() or None


def _reply(body: bytes) -> Reply:
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text = choice["message"].get("content")
        if isinstance(text, list):  # some servers give parts
            text = "".join(str(part.get("text", "")) for part in text)
        if not isinstance(text, str | None):
            raise TypeError
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Trouble("answers with what is no chat completion", tries=3) from None
    # Halves of surrogate pairs are JSON, and no text.
    return Reply(
        text=(text or "").encode("utf-8", "replace").decode(),
        finish=str(choice.get("finish_reason") or "")[:40],
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**40 else 0


def _seconds(headers: Any) -> float:
    """`Retry-After`: seconds, or a date; 0 where nothing is said."""
    said = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"\d{1,6}(\.\d+)?", said):
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Prompts and keys go where the user said, and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Connection(http.client.HTTPConnection):
    """Registers its socket, so that it can be closed from another thread."""

    def __init__(self, sockets: "weakref.WeakSet[socket.socket]", *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._sockets = sockets

    def connect(self) -> None:
        super().connect()
        self._sockets.add(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, sockets: "weakref.WeakSet[socket.socket]", *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._sockets = sockets

    def connect(self) -> None:
        super().connect()
        self._sockets.add(self.sock)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, sockets: "weakref.WeakSet[socket.socket]"):
        super().__init__()
        self._sockets = sockets

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        made: Any = partial(_Connection, self._sockets)
        return self.do_open(made, req)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, sockets: "weakref.WeakSet[socket.socket]"):
        super().__init__()
        self._sockets = sockets

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        made: Any = partial(_SecureConnection, self._sockets)
        return self.do_open(made, req)
