"""Talking to the hub: one file at a time, resumed, proved, and every failure in one sentence.

The client library keeps no part of a file across runs, hands a file out before anybody has looked
at its hash, and waits for minutes where it is asked to. Here a part is kept and gone on from, and
a file gets its name after its hash is right.
"""

import email.utils
import errno
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gemscope.errors import InputError

PAGE = "https://huggingface.co"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_TRIES = 3
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Held:
    """A file as the hub holds it."""

    path: str
    """From the root of its repository."""
    commit: str
    etag: str
    size: int | None


class _RefusedError(Exception):
    """The hub asks to wait, or has a failure of its own."""

    def __init__(self, status: int, seconds: int | None):
        super().__init__(status)
        self.status, self.seconds = status, seconds


def offline() -> bool:
    """Whether the user has forbidden requests; the library reads that once, when it is imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def checked_token(token: str | None) -> str | None:
    """`token`, or None for the one of the environment or of a login."""
    from huggingface_hub import get_token

    sent = get_token() if token is None else token
    # What cannot stand in a header would be shown in the error of the library below.
    if sent is not None and not re.fullmatch(r"[\x21-\x7e]+", sent):
        raise InputError(
            f"the token has characters that no token has: copy it again from {PAGE}/settings/tokens"
        )
    return token


@contextmanager
def conversation(*, quiet: bool) -> Iterator[None]:
    """The library as it is wanted here: no long waits, no warnings, and no bars if `quiet`."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
        logging,
    )

    session: Any = get_session()
    # Before 1.0 the library stood on requests, and has stood on httpx since.
    hooks = session.event_hooks if hasattr(session, "event_hooks") else session.hooks
    before, level = list(hooks["response"]), logging.get_verbosity()
    silence = quiet and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooks["response"] = [*before, _no_waiting]
        logging.set_verbosity_error()
        if silence:
            disable_progress_bars()
        try:
            yield
        finally:
            hooks["response"] = before
            logging.set_verbosity(level)
            if silence:
                enable_progress_bars()


def head(repo: str, path: str, *, revision: str, token: str | None) -> Held | None:
    """What the hub says of a file; None if there is no such file in the repository."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    url = hf_hub_url(repo, path, revision=revision)
    with told(repo, path):
        try:
            found = _asked(
                lambda: get_hf_file_metadata(
                    url,
                    token=token,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                    library_name="gemscope",
                )
            )
        except EntryNotFoundError:
            return None
    commit, etag = found.commit_hash or "", found.etag or ""
    # Both become names of files.
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not re.fullmatch(r"\w[\w.-]{0,127}", etag):
        raise InputError(_not_the_hub())
    return Held(path, commit, etag, found.size)


def listing(repo: str, folder: str, *, token: str | None) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in `folder`; none if it does not exist."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=token, library_name="gemscope")
    url: str | None = f"{constants.ENDPOINT}/api/models/{repo}/tree/main/{folder}".rstrip("/")
    entries: list[dict[str, str]] = []
    with told(repo, folder):
        while url is not None:
            page: Any = _asked(partial(get_session().get, url, headers=headers, timeout=10))
            try:
                hf_raise_for_status(page)
            except EntryNotFoundError:
                break
            try:
                entries += [{"type": e["type"], "path": e["path"]} for e in page.json()]
            except (ValueError, KeyError, TypeError):
                raise InputError(_not_the_hub()) from None
            url = page.links.get("next", {}).get("url")
    names = {kind: sorted(e["path"].rsplit("/", 1)[-1] for e in entries if e["type"] == kind)
             for kind in ("file", "directory")}  # fmt: skip
    return names["file"], names["directory"]


def transfer(repo: str, held: Held, file: Path, *, token: str | None) -> None:
    """Fill `file`, from where it ends, and prove that it is the file that the hub holds."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    # Redirected to another host, the libraries below leave the token behind.
    headers = build_hf_headers(token=token, library_name="gemscope")
    headers["Accept-Encoding"] = "identity"
    url = hf_hub_url(repo, held.path, revision=held.commit)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with told(repo, held.path, file.parent):
        with os.fdopen(os.open(file, flags | getattr(os, "O_BINARY", 0), 0o666), "ab") as stream:
            _fill(stream, url, headers, held)
            stream.flush()
            os.fsync(stream.fileno())
        if not is_whole(file, held):
            file.unlink()
            raise InputError(
                f"{held.path} of {repo} came with another content than the hub's hash of it, and "
                "was removed: run the command again, and if it comes so again, look at the proxy "
                "or at HF_ENDPOINT"
            )


def is_whole(file: Path, held: Held) -> bool:
    """Whether `file` has the size and the hash that the hub says."""
    size = file.stat().st_size
    if held.size is not None and size != held.size:
        return False
    if re.fullmatch(r"[0-9a-f]{64}", held.etag):
        made = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", held.etag):
        made = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # as git names a file
    else:
        return held.size is not None  # a mirror's own tag: its size is all there is to go by
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: made).hexdigest() == held.etag


def _fill(stream: BinaryIO, url: str, headers: dict[str, str], held: Held) -> None:
    from huggingface_hub.file_download import http_get

    if held.size is not None and stream.seek(0, os.SEEK_END) > held.size:
        stream.truncate(0)
    tries = _TRIES
    while True:
        have = stream.seek(0, os.SEEK_END)
        try:
            http_get(
                url,
                stream,
                resume_size=have,
                headers=dict(headers),
                expected_size=held.size,
                displayed_filename=held.path.rsplit("/", 1)[-1],
            )
            return
        except Exception as error:
            # Of what breaks a connection, the library tries only some again; as it does, begin to
            # count anew when something has come.
            cut = _kinds(error) & {"ReadError", "ChunkedEncodingError"} or _short(error)
            tries = _TRIES if stream.seek(0, os.SEEK_END) > have else tries - 1
            if not cut or not tries:
                raise
            time.sleep(1)


def _no_waiting(response: Any, *_: Any, **__: Any) -> None:
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _RefusedError(response.status_code, _wait(response.headers))


def _wait(headers: Any) -> int | None:
    """Seconds that the hub asks to wait."""
    after = headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return int(after)
    if found := re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", "")):
        return int(found[1])
    try:
        return max(0, round(email.utils.parsedate_to_datetime(after).timestamp() - time.time()))
    except ValueError:
        return None


def _asked(ask: Callable[[], _T]) -> _T:
    """The answer; of a failure that may pass, that of a second attempt."""
    try:
        return ask()
    except Exception as error:
        if not _passing(error):
            raise
    time.sleep(1)
    return ask()


def _passing(error: Exception) -> bool:
    if isinstance(error, _RefusedError):
        return error.status != 429
    return bool(_kinds(error) & (_SLOW | _UNREACHABLE | _BROKEN)) or _short(error)


# The library's own library is httpx, httpx2 or requests, by its version: told by names.
_SLOW = {"TimeoutException", "Timeout"}
_UNREACHABLE = {"ConnectError", "ConnectionError", "ProxyError"}
_BROKEN = {"ReadError", "WriteError", "RemoteProtocolError", "ChunkedEncodingError"}
_MALFORMED = {"InvalidURL", "UnsupportedProtocol", "MissingSchema", "InvalidSchema",
              "LocalProtocolError", "InvalidHeader", "TooManyRedirects"}  # fmt: skip


def _kinds(error: BaseException) -> set[str]:
    return {c.__name__ for c in type(error).__mro__ if c.__module__ != "builtins"}


def _short(error: Exception) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


@contextmanager
def told(repo: str, what: str, folder: Path | None = None) -> Iterator[None]:
    """Tell a failure over `what` of `repo` in one sentence; `folder` is where it is written."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        under = error.__cause__  # of "not in the cache either" that says nothing of why
        cause = under if isinstance(under, Exception) and _is_local(error) else error
        sentence = (
            _told_by_hub(cause, repo, what)
            or _told_by_network(cause, repo, what)
            or _told_by_disk(cause, folder)
        )
        if sentence is None:
            raise
        raise InputError(sentence) from None


def _is_local(error: Exception) -> bool:
    return "LocalEntryNotFoundError" in _kinds(error)


def _told_by_hub(error: Exception, repo: str, what: str) -> str | None:
    from huggingface_hub import errors

    page, file = f"{PAGE}/{repo}", f"{repo}/{what}".rstrip("/")
    if isinstance(error, _RefusedError):
        if error.status == 429:
            wait = f"{error.seconds} seconds" if error.seconds is not None else "a few minutes"
            return f"the hub is asked too often and wants a pause: run the command again in {wait}"
        return (
            f"the hub has a failure of its own ({error.status}) at {file}: run the command again "
            "in a while"
        )
    if isinstance(error, errors.FileMetadataError):
        return _not_the_hub()
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        who = f"{_LOG_IN}, accept" if status == 401 else "with the account of your token, accept"
        return f"{repo} is gated: {who} its licence at {page}, and run the command again"
    if status == 401 and "credentials" in str(error.response.headers.get("X-Error-Message")):
        return (
            f"the hub does not know the token it was sent: make one at {PAGE}/settings/tokens, "
            f"and {_LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"the hub shows no repository {repo}: check its name, and if it is private, {_LOG_IN}"
        )
    if isinstance(error, errors.EntryNotFoundError | errors.RevisionNotFoundError) or status == 404:
        return f"the hub has no {what} in {repo}: look for it at {page}/tree/main"
    if status == 403:
        return (
            f"the hub does not let you read {file}: look at {page}, and at what your token may "
            f"read at {PAGE}/settings/tokens"
        )
    return f"the hub refuses {file} with status {status}: look at {page}"


def _told_by_network(error: Exception, repo: str, what: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo}/{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it"
    kinds, at = _kinds(error), constants.ENDPOINT
    if kinds & _SLOW:
        return f"{at} does not answer: check the network, and run the command again to go on"
    if kinds & _BROKEN or _short(error):
        what = what or "the list of files"
        return f"{what} of {repo} came incomplete: run the command again and it goes on"
    if kinds & _UNREACHABLE:
        why = re.search(r"\[Errno -?\d+\] ([\w ]+)|(CERTIFICATE_VERIFY_FAILED)", str(error))
        return (
            f"{at} cannot be reached{f' ({why[1] or why[2]})' if why else ''}: check the network, "
            "a proxy, and HF_ENDPOINT if it is set, and run the command again"
        )
    if kinds & _MALFORMED:
        return f"{at} cannot be asked: check HF_ENDPOINT, such as {PAGE}, and the proxy"
    return None


def _told_by_disk(error: Exception, folder: Path | None) -> str | None:
    if not isinstance(error, OSError) or folder is None:
        return None
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return (
            f"the disk of {folder} is full: make room, or choose another place with --to or "
            "HF_HOME, and run the command again"
        )
    return f"{folder} cannot be written: {error.strerror or type(error).__name__}"


def _not_the_hub() -> str:
    from huggingface_hub import constants

    return (
        f"what answers at {constants.ENDPOINT} is not the hub: look for a proxy or a log-in page "
        "of the network, and at HF_ENDPOINT"
    )
