"""A hub on this machine: the protocol that its real client speaks, with failures on demand.

Repositories are folders. Large files are answered as the hub does, with a redirect to another
host (here another port), small ones with a redirect to a cache of the same host.

    with Hub({"owner/name": folder}) as hub:
        hub.faults["owner/name/weights.safetensors"] = Fault("half")
        subprocess.run([...], env=hub.environment(home))
        hub.asked("GET")
"""

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".npz", ".gguf", ".bin")
"""Kept by content hash at another host, as by git-lfs; all others are small, as by git."""

_CODES = {
    "gated": (403, "GatedRepo", "Access to this model is restricted"),
    "gated to strangers": (401, "GatedRepo", "Access to this model is restricted"),
    "private": (401, "RepoNotFound", "Repository not found"),
    "bad token": (401, None, "Invalid credentials in Authorization header"),
    "forbidden": (403, None, "Forbidden"),
    "no repository": (404, "RepoNotFound", "Repository not found"),
    "no file": (404, "EntryNotFound", "Entry not found"),
    "busy": (429, None, "Too many requests"),
    "broken": (500, None, "Internal error"),
    "unavailable": (503, None, "Unavailable"),
}
_OF_BODIES = ("half", "wrong", "slow")


@dataclass
class Fault:
    """What goes wrong: a name of `_CODES`, or `half`, `wrong`, `slow`, `silent`, `drop`, `page`."""

    kind: str
    after: int | None = None
    """Seconds of `Retry-After`."""
    times: int = 10**9
    """How often it happens; afterwards all is well."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict
    elsewhere: bool
    """Whether it went to the other host, to which no token must go."""


class Hub:
    """The server; `faults` are by repository, or by repository and path of a file."""

    def __init__(self, repos):
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.faults: dict[str, Fault] = {}
        self.log: list[Request] = []
        self.versions = dict.fromkeys(self.repos, "1")
        """Another text makes another commit."""
        self._servers = []
        self._hashes = {}

    def __enter__(self):
        for elsewhere in (False, True):
            handler = partial(_Handler, self, elsewhere)
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def other_host(self):
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def environment(self, home, **more):
        """The environment of a process that is to use this hub, with its cache below `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return kept | more

    def asked(self, method=None):
        """Names of the files asked for at the hub itself, as `repository/path`."""
        found = []
        for request in self.log:
            name = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", request.path)
            if name and method in (None, request.method):
                found.append(f"{name[1]}/{name[2]}")
        return found

    def commit(self, repo):
        return hashlib.sha1(f"{repo} {self.versions[repo]}".encode()).hexdigest()

    def etag(self, file):
        """The hash that the hub gives a file: of its content, or as git names it."""
        key = (file, file.stat().st_mtime_ns)
        if key not in self._hashes:
            content = file.read_bytes()
            whole = b"blob %d\0" % len(content) + content
            large = file.name.endswith(LARGE)
            made = hashlib.sha256(content) if large else hashlib.sha1(whole)
            self._hashes[key] = made.hexdigest()
        return self._hashes[key]

    def fault(self, repo, path, *, body):
        """What goes wrong with this request; a fault of a body does so while it is sent."""
        for key in (f"{repo}/{path}", repo):
            fault = self.faults.get(key)
            if fault and fault.times > 0 and (fault.kind in _OF_BODIES) == body:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, elsewhere, *arguments):
        self.hub, self.elsewhere = hub, elsewhere
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.log.append(Request(self.command, path, headers, self.elsewhere))
        routes = (
            (r"/(?:content|api/resolve-cache)/([^/]+/[^/]+)/([^/]+)/(.+)", self._content),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)()", self._paths),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?()", self._info),
        )
        for route, answer in routes:
            if found := re.fullmatch(route, path):
                repo, _, inner = found.groups()
                if answer != self._content and self._failed(repo, inner):
                    return
                answer(repo, inner.rstrip("/"))
                return
        self._send(404)

    def _failed(self, repo, path):
        """Whether it went wrong, which has been answered."""
        if repo not in self.hub.repos:
            return self._refuse(*_CODES["no repository"])
        fault = self.hub.fault(repo, path, body=False)
        if fault is None:
            return False
        if fault.kind == "drop":
            self.close_connection = True
        elif fault.kind == "silent":
            time.sleep(8)
            self.close_connection = True
        elif fault.kind == "page":
            self._send(200, {"Content-Type": "text/html"}, b"<html>Log in to this network")
        else:
            after = {} if fault.after is None else {"Retry-After": str(fault.after)}
            self._refuse(*_CODES[fault.kind], more=after)
        return True

    def _refuse(self, status, code, message, more=None):
        headers = {"X-Error-Message": message} | (more or {})
        self._send(status, headers | ({"X-Error-Code": code} if code else {}))
        return True

    def _resolve(self, repo, path):
        file = self.hub.repos[repo] / path
        commit = {"X-Repo-Commit": self.hub.commit(repo)}
        if not file.is_file():
            self._refuse(*_CODES["no file"], more=commit)
            return
        large, etag = file.name.endswith(LARGE), self.hub.etag(file)
        at = f"{self.hub.other_host}/content" if large else "/api/resolve-cache"
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.stat().st_size)}
        where = {"Location": f"{at}/{repo}/{commit['X-Repo-Commit']}/{path}"}
        self._send(302 if large else 307, commit | where | (linked if large else {}))

    def _content(self, repo, path):
        file = self.hub.repos[repo] / path
        content, status, headers = file.read_bytes(), 200, {"Accept-Ranges": "bytes"}
        if not self.elsewhere:
            headers |= {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{self.hub.etag(file)}"'}
        size = len(content)
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, content = 206, content[int(found[1]) :]
            headers["Content-Range"] = f"bytes {found[1]}-{size - 1}/{size}"
        fault = self.hub.fault(repo, path, body=True) if self.command == "GET" else None
        kind = fault.kind if fault else ""
        if kind == "wrong":
            content = bytes(255 - byte for byte in content)
        if kind == "slow":
            time.sleep(1)
        self._send(status, headers, content, whole=kind != "half")

    def _entry(self, repo, file):
        path = file.relative_to(self.hub.repos[repo]).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        etag, size = self.hub.etag(file), file.stat().st_size
        entry = {"type": "file", "path": path, "oid": etag[:40], "size": size}
        if file.name.endswith(LARGE):
            entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
        return entry

    def _tree(self, repo, path):
        folder = self.hub.repos[repo] / path
        if not folder.is_dir():
            self._refuse(*_CODES["no file"])
            return
        self._json([self._entry(repo, file) for file in sorted(folder.iterdir())])

    def _paths(self, repo, _):
        wanted = json.loads(self.body)["paths"]
        found = [self.hub.repos[repo] / path for path in wanted]
        self._json([self._entry(repo, file) for file in found if file.exists()])

    def _info(self, repo, _):
        root = self.hub.repos[repo]
        files = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
        self._json(
            {"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "private": False}
            | {"gated": False, "tags": [], "siblings": [{"rfilename": name} for name in files]}
        )

    def _json(self, value):
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status, headers=None, content=b"", *, whole=True):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(content if whole else content[: len(content) // 2])
        except OSError:
            self.close_connection = True
        if not whole:
            self.close_connection = True
