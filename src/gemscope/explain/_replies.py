"""Raw replies, kept: a line of JSON each, on the disk before anybody sees the answer.

A line begins and ends with a line break, so that one cut off by a crash spoils no other; what is
not whole is passed over and asked again.
"""

import errno
import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from gemscope.errors import InputError

from ._chat import Reply, Request

_LONGEST = 2**25
_FIELDS = ("text", "finish", "tokens_in", "tokens_out", "created")


class Replies:
    """The replies of one model, by the keys of its requests; any thread may read and write."""

    def __init__(self, folder: Path, at: str, model: str):
        self.at, self.model = at, model
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", model)[-40:].strip("-.") or "model"
        tag = hashlib.sha256(f"{at}\0{model}".encode()).hexdigest()[:12]
        self.file = folder / f"{name}-{tag}.jsonl"
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{self.file} cannot be written: {error.strerror}") from None
        self._scan()

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def find(self, request: Request) -> Reply | None:
        """The reply to a request, if it was answered before."""
        place = self._places.get(request.key(self.at, self.model))
        if place is None:
            return None
        row = _row(os.pread(self._handle, place[1], place[0]))
        return None if row is None else Reply(**{name: row[name] for name in _FIELDS})

    def keep(self, request: Request, reply: Reply) -> None:
        """Write a reply; when this returns it will outlast a power cut."""
        key = request.key(self.at, self.model)
        row = {"key": key, "for": request.purpose} | {n: getattr(reply, n) for n in _FIELDS}
        line = json.dumps(row, ensure_ascii=False).encode()
        with self._lock:
            try:
                written = os.write(self._handle, b"\n" + line + b"\n")
                if written != len(line) + 2:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._handle)
                end = os.lseek(self._handle, 0, os.SEEK_CUR)
            except OSError as error:
                raise InputError(
                    f"{self.file} cannot be written: {error.strerror}; make room, and run the same "
                    "command again to go on"
                ) from None
            self._places[key] = (end - len(line) - 1, len(line))

    def _scan(self) -> None:
        place = 0
        with self.file.open("rb") as lines:
            while line := lines.readline(_LONGEST):
                if (row := _row(line)) is not None:
                    self._places[row["key"]] = (place, len(line))
                place += len(line)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line that is whole and holds what it should, else None."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
        texts = all(isinstance(row[n], str) for n in ("key", "text", "finish", "created"))
        counts = all(isinstance(row[n], int) for n in ("tokens_in", "tokens_out"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if texts and counts else None
