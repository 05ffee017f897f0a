"""The text of the miniature: the source of the Python standard library, split by document.

Held-out modules are chosen by a hash of their path, so the choice is neither ours nor the
model's. A held-out module keeps its test modules out of training too, and a candidate that is
largely a copy of another file (`tokenize` lives twice in the library) is not held out at all:
predicting a copy would measure memory.

The library is that of the running interpreter. Another Python version gives other text; the
model card names the version that made the published miniature.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["library", "tests", "heldout"]

_HELD_OUT_SHARE = 24  # one candidate in so many
_SMALLEST, _LARGEST = 6_000, 60_000  # bytes of a held-out module: a page of text, not a book
_MAX_COPIED = 0.10  # share of a held-out module's long lines that may stand elsewhere


@dataclass(frozen=True, slots=True)
class Document:
    """One file of the library: its path inside it, and its text."""

    path: str
    text: str


def library_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def documents(split: Split) -> list[Document]:
    """The documents of one split, sorted by path.

    `library` and `tests` are what the miniature is trained on; `heldout` is what it is evaluated
    on. The three are disjoint.
    """
    everything = list(_read_library(library_root()))
    held_out = _held_out(everything)
    if split == "heldout":
        return [d for d in everything if d.path in held_out]
    barred = {Path(path).stem.strip("_") for path in held_out}
    rest = [d for d in everything if d.path not in held_out]
    if split == "library":
        return [d for d in rest if not _is_test(d.path)]
    return [d for d in rest if _is_test(d.path) and not _tests_one_of(d.path, barred)]


def _read_library(root: Path) -> Iterator[Document]:
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith(("site-packages/", "dist-packages/")) or _is_table(path):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test files in deliberately odd encodings
        if text.strip():
            yield Document(path, text)


def _is_table(path: str) -> bool:
    # Character tables: 1.4 MB of `'\u0161' # 0x9A -> ...`, language of no kind.
    return path.startswith("encodings/") and path != "encodings/__init__.py"


def _is_test(path: str) -> bool:
    folders = path.split("/")[:-1]
    return any(f in ("test", "tests", "idle_test") for f in folders) or path.startswith(
        "pydoc_data/"  # one 750 kB string of documentation would be a sixteenth of the library
    )


def _tests_one_of(path: str, stems: set[str]) -> bool:
    stem = Path(path).stem
    return any(part.removeprefix("test_").strip("_") in stems for part in [stem, *path.split("/")])


def _held_out(everything: list[Document]) -> set[str]:
    candidates = [
        d
        for d in everything
        if not _is_test(d.path)
        and _SMALLEST <= len(d.text.encode()) <= _LARGEST
        and int.from_bytes(hashlib.sha256(d.path.encode()).digest()[:4], "big") % _HELD_OUT_SHARE
        == 0
    ]
    chosen = {d.path for d in candidates}
    elsewhere: dict[str, int] = {}
    for document in everything:
        for line in _long_lines(document.text):
            elsewhere[line] = elsewhere.get(line, 0) + 1
    for document in candidates:
        lines = _long_lines(document.text)
        copied = sum(elsewhere[line] > 1 for line in lines)
        if not lines or copied / len(lines) > _MAX_COPIED:
            chosen.discard(document.path)
    return chosen


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}
