"""Where downloaded files go: the hub's local cache, or a folder of the user's."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemscope.errors import InputError

from ._transfer import Held, is_whole, told


def storage(repo: str) -> Path:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def snapshots(repo: str) -> Iterator[Path]:
    """Cached versions of a repository: that of its branch first, then the latest.

    Read from the folders themselves, as importing the library's own search takes longer than it.
    """
    root = storage(repo) / "snapshots"
    try:
        main = (root.parent / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        main = ""
    try:
        found = sorted(root.iterdir(), key=lambda s: (s.name != main, -s.stat().st_mtime))
    except OSError:
        return
    yield from found


@dataclass(frozen=True, slots=True)
class Cache:
    """The hub's cache: files by their hash, and links to them by commit and name."""

    repo: str

    @property
    def root(self) -> Path:
        """The repository's folder."""
        return storage(self.repo)

    def of(self, commit: str) -> Path:
        """Where the files of a commit are by their names."""
        return self.root / "snapshots" / commit

    def final(self, held: Held) -> Path:
        """Where a whole file goes."""
        return self.root / "blobs" / held.etag

    def partial(self, held: Held) -> Path:
        """Where a part of it is kept."""
        return self.final(held).with_name(f"{held.etag}.incomplete")

    def lock(self, held: Held) -> Path:
        """What two processes that want it agree by."""
        return self.root.parent / ".locks" / self.root.name / f"{held.etag}.lock"

    def has(self, held: Held) -> bool:
        """Whether the whole file is there; it was proved when it came."""
        blob = self.final(held)
        return blob.is_file() and held.size in (None, blob.stat().st_size)

    def keep(self, held: Held, token: str | None) -> None:
        """Have the library give the file its name; it finds it in place and gets nothing."""
        from huggingface_hub import hf_hub_download

        with told(self.repo, held.path, self.root):
            hf_hub_download(
                self.repo,
                held.path,
                revision=held.commit,
                token=token,
                library_name="gemscope",
            )

    def finish(self, commit: str) -> None:
        """Say that `commit` is the branch's, so that a model is found by its name alone."""
        ref = self.root / "refs" / "main"
        with told(self.repo, "", self.root):
            ref.parent.mkdir(parents=True, exist_ok=True)
            made = ref.with_name(f"main.{os.getpid()}.incomplete")
            made.write_text(commit, "utf-8")
            os.replace(made, ref)


@dataclass(frozen=True, slots=True)
class Folder:
    """A user's folder, in which files are at `<repository name>/<path>`."""

    root: Path
    repo: str

    def of(self, _commit: str) -> Path:
        """Where the files are by their names."""
        return self.root / self.repo.rsplit("/", 1)[-1]

    def at(self, path: str, beside: str = "") -> Path:
        """Where a file goes, or a hidden one beside it.

        Nothing is written through a link, which could lead out of the folder.
        """
        file = self.of("") / path
        if beside:
            file = file.with_name(f".{file.name}.{beside}")
        for part in (file, *file.parents):
            if part == self.root:
                break
            if part.is_symlink():
                raise InputError(
                    f"{part} is a symbolic link, and nothing is written through one: remove it, "
                    "or give another folder with --to"
                )
        return file

    def final(self, held: Held) -> Path:
        """Where a whole file goes."""
        return self.at(held.path)

    def partial(self, held: Held) -> Path:
        """Where a part of it is kept."""
        return self.at(held.path, beside=f"{held.etag[:16]}.incomplete")

    def lock(self, held: Held) -> Path:
        """What two processes that want it agree by."""
        return self.at(held.path, beside="lock")

    def has(self, held: Held) -> bool:
        """Whether the whole file is there; anything may have happened to it since it came."""
        file = self.final(held)
        return file.is_file() and is_whole(file, held)

    def keep(self, held: Held, _token: str | None) -> None:
        """Leave nothing beside the file."""
        self.lock(held).unlink(missing_ok=True)

    def finish(self, commit: str) -> None:
        """Nothing: the names are the files' own."""
