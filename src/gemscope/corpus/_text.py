"""Where text comes from: files, folders, data sets, and what is bundled."""

import glob
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gemscope import miniature
from gemscope.errors import InputError
from gemscope.miniature import Document

from ._presets import PRESETS, read_preset

BUNDLED = "miniature"
"""Name of the bundled held-out text."""
LIBRARY = "python"
"""Name of the text the miniature was trained on: the running Python's standard library."""


def read_text(source: str) -> list[Document]:
    """The documents of a named text, a file, a folder, or a glob pattern.

    Named texts are the bundled ones, `miniature` and `python`, and kinds of text cut out of the
    latter: `code`, `docstrings` and `tests`, or `python:tests` where a file has that name.

    A `.jsonl` file holds one document a line, an object with `text`; any other file is one
    document. Of a folder, every file is read that is UTF-8 text and not
    hidden.
    """
    if source == BUNDLED:
        return _read_lines(miniature.HELD_OUT)
    if source == LIBRARY:
        return miniature.documents("library") + miniature.documents("tests")
    if (preset := source.removeprefix(f"{LIBRARY}:")) in PRESETS and (
        preset != source or not os.path.exists(source)
    ):
        return read_preset(preset)
    # Unlike those of pathlib, these do not fail on what cannot be a path.
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        found = _read_file(path)
    elif source and os.path.isdir(path):
        found = list(_read_all(sorted(f for f in path.rglob("*") if _is_shown(f, path))))
    else:
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise InputError(
                f"no text at {source!r}: give a file, a folder, a glob pattern such as "
                f"'docs/**/*.md', {BUNDLED!r}, {LIBRARY!r}, or {', '.join(map(repr, PRESETS))}"
            )
        found = list(_read_all([f for f in files if f.is_file()]))
    if not any(d.text.strip() for d in found):
        raise InputError(f"the text {source!r} is empty; give one with words in it")
    return found


def read_dataset(name: str, *, limit: int = 20_000) -> list[Document]:
    """The first `limit` documents of a data set of the hub, `OWNER/NAME[:SPLIT[:COLUMN]]`.

    Streamed; needs the extra `gemscope[data]`. Split and column are `train` and `text` if left out.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"--dataset {name} needs the datasets library: pip install 'gemscope[data]'"
        ) from None
    path, split, column = (*name.split(":"), "", "")[:3]
    column = column or "text"
    try:
        # Remote code is never run: the option to allow it is not passed.
        rows = datasets.load_dataset(path, split=split or "train", streaming=True)
        found = [
            Document(f"{path}[{i}]", str(row[column])) for i, row in enumerate(islice(rows, limit))
        ]
    except KeyError:
        raise InputError(
            f"data set {path} has no column {column!r}; name one: {path}:SPLIT:COLUMN"
        ) from None
    except Exception as error:  # the library's errors have no common class
        raise InputError(f"data set {name!r} cannot be read: {_first_line(error)}") from None
    if not found:
        raise InputError(f"data set {name!r} is empty")
    return found


def _is_shown(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()


def _read_file(file: Path) -> list[Document]:
    if file.suffix == ".jsonl":
        return _read_lines(file)
    try:
        return [Document(str(file), file.read_text("utf-8"))]
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _read_all(files: list[Path]) -> Iterator[Document]:
    for file in files:
        try:
            yield from _read_file(file)
        except InputError:
            if file.suffix == ".jsonl":
                raise
            continue  # pictures and archives among the text


def _read_lines(file: Path) -> list[Document]:
    found = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                row["text"].encode("utf-8")  # text, and without halves of surrogate pairs
                found.append(Document(str(row.get("path", f"{file.name}:{number}")), row["text"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(
                    f'{file} line {number} is not a document: each line is {{"text": "..."}}'
                ) from None
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
