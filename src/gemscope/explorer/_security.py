"""Who is answered: this machine's own pages, and whoever holds the token where others may come.

A page of another site can make a browser send requests here, and by DNS even under a name of its
own; it can neither choose the Host header nor hide its Origin. So both are checked, and writing
needs a token that only pages of this server know.
"""

import asyncio
import hmac
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_COOKIE = "gemscope"
_HEADERS_BYTES = 2**16
"""Of all headers of a request."""
_LEAVING = 10.0
"""Seconds that work of a reader who left has to come to its end."""


@dataclass(frozen=True, slots=True)
class Access:
    """Which names the server answers to, and the token that readers need, if any."""

    hosts: tuple[str, ...] = _LOOPBACK
    """Host names without port; empty where any will do, because a token is asked for."""
    token: str | None = None
    page_token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """What pages of this server send with every write."""


class Guard:
    """Checks size, host, origin and token before anything else sees a request, and sets headers.

    When the reader leaves, what answers is cancelled.
    """

    def __init__(self, app: ASGIApp, access: Access, body: int):
        self._app, self._access, self._body = app, access, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    out[name] = value
                fixed = scope["path"].startswith("/static/")
                out.setdefault("Cache-Control", "no-cache" if fixed else "no-store")
            await send(message)

        if answer := self._instead(scope):
            await answer(scope, receive, guarded)
        else:
            await self._answer(scope, receive, guarded)

    def _instead(self, scope: Scope) -> Response | None:
        """What a request gets that may not reach the pages."""
        headers = Headers(scope=scope)
        if refusal := self._too_long(scope):
            return PlainTextResponse(refusal[1] + "\n", refusal[0])
        asked = scope["query_string"].decode("latin-1")
        given = parse_qs(asked).get("token", [])
        if refusal := self._refusal(scope["method"], headers, given):
            return PlainTextResponse(refusal[1] + "\n", refusal[0])
        if self._access.token and given:
            # The token goes from the address to a cookie, so that it is not in links and histories.
            rest = [pair for pair in parse_qsl(asked, True) if pair[0] != "token"]
            # Two slashes at the front would name another server.
            path = "/" + quote(scope["path"].lstrip("/\\"))
            kept = RedirectResponse(f"{path}?{urlencode(rest)}" if rest else path, 303)
            kept.set_cookie(_COOKIE, self._access.token, httponly=True, samesite="strict")
            return kept
        return None

    def _too_long(self, scope: Scope) -> tuple[int, str] | None:
        address = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if address > self._body:
            return 414, f"an address of more than {self._body:,} bytes is refused; cut the text"
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADERS_BYTES:
            return 431, f"headers of more than {_HEADERS_BYTES:,} bytes are refused"
        return None

    def _refusal(
        self, method: str, headers: Headers, given: Sequence[str]
    ) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self._access.hosts and _name(host) not in {h.strip("[]") for h in self._access.hosts}:
            return 421, f"this server does not answer to {host[:100]!r}"
        origin = headers.get("origin")
        if origin is not None and not _same(origin, host):
            return 403, "requests from other sites are refused"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and (
            headers.get("sec-fetch-mode") != "navigate"
            or headers.get("sec-fetch-dest", "document") != "document"
        ):
            return 403, "requests from other sites are refused"
        if self._access.token:
            held = [*given, _cookie(headers)]
            if not any(_equal(one, self._access.token) for one in held):
                return 401, "this server asks for a token: open the address that it printed"
        if method not in ("GET", "HEAD") and not _equal(
            headers.get("x-gemscope", ""), self._access.page_token
        ):
            return 403, "writing needs the token of a page of this server in X-Gemscope"
        length = headers.get("content-length") or "0"
        if not (length.isascii() and length.isdecimal()):
            return 400, "a content length is a number"
        if len(length) > 12 or int(length) > self._body:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"a request of more than {self._body:,} bytes is refused"

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of the pages, unless the reader leaves or sends more than is taken."""
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async def watch() -> bool:
            """Hand on what comes until the reader leaves; true if too much comes."""
            seen = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                seen += len(message.get("body", b""))
                if seen > self._body:
                    return True
                inbox.put_nowait(message)

        async def answer() -> None:
            await self._app(scope, inbox.get, noting)

        answering = asyncio.create_task(answer())
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
                return
            too_large = watching.result()
            answering.cancel()
            await asyncio.wait({answering}, timeout=_LEAVING)
            if too_large and not begun:
                await PlainTextResponse(self._too_large() + "\n", 413)(scope, receive, send)
        finally:
            for task in (answering, watching):
                task.cancel()
                if task.done():
                    with suppress(asyncio.CancelledError):
                        task.exception()  # or it is said to be lost


def _name(host: str) -> str:
    """A host header without its port; nothing if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())


def _cookie(headers: Headers) -> str:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == _COOKIE:
            return value
    return ""
