"""How far a harvest has come, in its scratch folder: what a run after a power cut goes on from."""

import os
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gemscope.errors import InputError

from ._manifest import Checksum32, Contents
from ._place import write_whole
from ._sums import Sums

KEYS = 2**63
"""Keys are from 0 to this."""


class Bucket(BaseModel):
    """The records whose keys are from `low` to below `high`."""

    model_config = ConfigDict(strict=True)

    low: int
    high: int
    tokens: int = 0
    """Whole records known to be on the disk."""

    def file(self, scratch: Path) -> Path:
        """Where the records are."""
        return scratch / f"{self.low:016x}-{self.high:016x}.records"


def buckets(low: int, high: int, count: int) -> list[Bucket]:
    """`count` buckets of equal ranges of keys, together from `low` to `high`."""
    edges = [low + (high - low) * i // count for i in range(count + 1)]
    return [Bucket(low=a, high=b) for a, b in pairwise(edges)]


class _State(BaseModel):
    model_config = ConfigDict(strict=True)

    contents: Contents
    buckets: list[Bucket]
    batches: int = 0
    """Forward passes whose tokens are all in buckets."""
    tokens: int = 0
    """Their tokens."""
    shards: list[dict[str, Checksum32]] = []
    """Checksums of the shards that are in the store."""


class Progress:
    """The state of a harvest, and its file."""

    def __init__(self, scratch: Path, state: _State, sums: Sums):
        self.scratch, self.state, self.sums = scratch, state, sums

    @classmethod
    def begin(cls, scratch: Path, contents: Contents, count: int) -> "Progress":
        """A harvest that has not begun, with `count` empty buckets."""
        state = _State(contents=contents, buckets=buckets(0, KEYS, count))
        return cls(scratch, state, Sums(contents.sites))

    @classmethod
    def load(cls, scratch: Path, contents: Contents) -> "Progress | None":
        """The harvest of `contents` under way in `scratch`, if there is one."""
        file = scratch / _FILE
        if not file.exists():
            return None
        try:
            state = _State.model_validate_json(file.read_bytes())
            sums = Sums(state.contents.sites)
            sums.count = state.tokens
            if state.batches:
                found = load_file(_sums_file(scratch, state.batches))
                sums.sums = {site: found[site] for site in state.contents.sites}
        except (OSError, KeyError, ValidationError, SafetensorError, InputError):
            raise InputError(
                f"the unfinished harvest in {scratch} cannot be read; remove that folder to begin "
                "anew"
            ) from None
        was, now = state.contents.model_dump(), contents.model_dump()
        if other := [f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key]]:
            raise InputError(
                f"{scratch} holds an unfinished harvest of something else: {'; '.join(other)}; "
                "ask for the same to go on, or remove that folder"
            )
        return cls(scratch, state, sums)

    def save(self) -> None:
        """Write the state; whatever happens, this one or the one before it is there."""
        kept = _sums_file(self.scratch, self.state.batches)
        if self.state.batches and not kept.exists():
            write_whole(kept, save(self.sums.sums))
        write_whole(self.scratch / _FILE, self.state.model_dump_json().encode())
        for file in self.scratch.glob("sums-*"):
            if file != kept:
                file.unlink()

    def mend(self, bucket: Bucket, record: int) -> None:
        """Cut off what was written to a bucket after the state was."""
        file, size = bucket.file(self.scratch), bucket.tokens * record
        found = file.stat().st_size if file.exists() else 0
        if found < size:
            raise InputError(
                f"{file} has lost records; remove the folder {self.scratch} to begin anew"
            )
        if found > size:
            os.truncate(file, size)


_FILE = "progress.json"


def _sums_file(scratch: Path, batches: int) -> Path:
    return scratch / f"sums-{batches}.safetensors"
