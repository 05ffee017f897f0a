"""A folder of a store: on this machine, or behind any URL that fsspec knows."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemscope.errors import InputError


class Place:
    """Files of a store by name, such as `3.mlp_in/000000.safetensors`."""

    def __init__(self, url: str):
        self.url = url
        self.local: Path | None = None
        """The folder, if it is on this machine."""
        if "://" not in url and "::" not in url:
            self.local = Path(url).expanduser()
            return
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

        try:
            fs, path = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"{url} cannot be opened: {error}; give a folder, or a URL of a protocol that "
                "fsspec knows here"
            ) from None
        self._fs: Any = fs
        self._root = path.rstrip("/")
        if isinstance(fs, LocalFileSystem):
            self.local = Path(path)

    def read(self, name: str, limit: int) -> bytes | None:
        """A whole file of at most `limit` bytes; None where there is none."""
        with self._told():
            try:
                if self.local is not None:
                    with (self.local / name).open("rb") as file:
                        return file.read(limit)
                return self._fs.cat_file(f"{self._root}/{name}", start=0, end=limit)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of each file in `folder`, by name."""
        with self._told():
            try:
                if self.local is not None:
                    found = [(f.name, f.stat().st_size) for f in (self.local / folder).iterdir()]
                else:
                    listed = self._fs.ls(f"{self._root}/{folder}", detail=True)
                    found = [(e["name"].rsplit("/", 1)[-1], e["size"]) for e in listed]
            except (FileNotFoundError, NotADirectoryError):
                found = []
        return {f"{folder}/{name}": size for name, size in found if size is not None}

    def is_empty(self) -> bool:
        """Whether nothing is there, or only an empty folder."""
        with self._told():
            try:
                if self.local is not None:
                    return not any(self.local.iterdir())
                return not self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return True

    def near(self, name: str, scratch: Path) -> Path:
        """Where on this machine to write a file before it is published."""
        part = (self.local or scratch) / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        return part

    def publish(self, part: Path, name: str) -> None:
        """Make the finished file `part` the store's file `name`; nobody sees half of it."""
        if self.local is not None:
            os.replace(part, self.local / name)
            return
        # An object appears when it is whole; file systems get the folder first.
        self._fs.makedirs(f"{self._root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(part), f"{self._root}/{name}")
        part.unlink()

    def fetch(self, name: str, folder: Path) -> Path:
        """A copy in `folder` of the file `name`, which is elsewhere."""
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._fs.get_file(f"{self._root}/{name}", str(copy))
        return copy

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.url} cannot be read: {error.strerror or error}") from None


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, even after a power cut."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def remove(folder: Path) -> None:
    """Remove `folder` and what is in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
