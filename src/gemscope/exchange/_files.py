"""Files from elsewhere, read within bounds, and files of ours, written whole or not at all."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gemscope.errors import InputError

LARGEST_DOCUMENT = 512 * 2**20
"""Bytes of a JSON file, which is held in memory whole."""
LARGEST_FILE = 8 * 2**30
"""Bytes of one file of lines, unpacked."""
LONGEST_LINE = 16 * 2**20
MARK = "gemscope.json"
"""Written beside the files of an export: what they were made from."""
_CHUNK = 2**20
_GZIP = b"\x1f\x8b"


def read_json(file: Path) -> Any:
    """The JSON value in `file`, plain or gzipped; InputError if it is not one that all can read.

    Refused beside bad syntax: NaN and infinities, a key that an object has twice (one of the two
    would be dropped without a word), more than `LARGEST_DOCUMENT` bytes, endless nesting.
    """
    raw = b"".join(_bytes(file, LARGEST_DOCUMENT))
    try:
        return parse(raw)
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file, plain or gzipped, that are not empty, with their numbers from 1.

    A line is at most `LONGEST_LINE` bytes, all of them at most `LARGEST_FILE`: a small file that
    unpacks to terabytes is refused when it passes that, not when the memory is full.
    """
    number, rest = 0, b""
    for chunk in _bytes(file, LARGEST_FILE):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > LONGEST_LINE:
            raise InputError(
                f"line {number + 1} of {file} is longer than {LONGEST_LINE:,} bytes: "
                "this is not a file of JSON lines"
            )
    if rest.strip():
        yield number + 1, rest


def is_empty(file: Path) -> bool:
    """Whether nothing but white space is in a file."""
    return not any(chunk.strip() for chunk in _bytes(file, LARGEST_FILE))


def parse(raw: bytes) -> Any:
    """A JSON value; ValueError, with a short reason, for what is not."""
    try:
        return json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_number,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump(value: Any, *, indent: int | None = None) -> str:
    """JSON text; NaN is an error of ours, since no other program could read it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def clean(text: str) -> str:
    """`text` without control characters (line breaks and tabs stay) and halves of characters.

    Labels of strangers are shown in terminals and pages: an escape sequence would act there.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or not _is_control(c))


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that is there already, before anything is computed for it."""
    if (target.exists() or target.is_symlink()) and not force:
        raise InputError(f"{target} exists; choose another --to, or give --force to replace it")


@contextmanager
def new_file(target: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which becomes `target` when all of it is on the disk."""
    check_target(target, force=force)
    if target.is_dir():
        raise InputError(f"{target} is a folder; --to names the file to write")
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part"
        )
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.chmod(0o644)  # made its owner's alone
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well.

    With `force` a folder that an export wrote, and no other, is put aside until the new one has
    its name.
    """
    check_target(target, force=force)
    if target.exists() and not (target.is_dir() and _made_here(target)):
        raise InputError(
            f"{target} is not a folder that an export wrote: --force does not remove it, "
            "choose another --to"
        )
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        held = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:100]}."))
        made, old = held / "new", held / "old"
        made.mkdir()
        try:
            yield made
            for file in sorted(made.rglob("*")):
                if file.is_file():
                    _to_disk(file)
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(made, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
        finally:
            shutil.rmtree(held, ignore_errors=True)


def write_json(target: Path, value: Any, *, force: bool = False) -> None:
    """Write a JSON file, one line an element of a list it holds where that is easy to read."""
    with new_file(target, force=force) as stream:
        stream.write((dump(value, indent=1) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` with what JSON cannot say (NaN, infinities) as None, and numpy's numbers as ours."""
    match value:
        case bool() | None | str() | int():
            return value
        case float():
            return value if value - value == 0 else None
        case dict():
            return {str(k): finite(v) for k, v in value.items()}
        case list() | tuple():
            return [finite(v) for v in value]
    return finite(value.tolist())  # numpy's


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys included."""
    match value:
        case str():
            return change(value)
        case dict():
            return {change(str(k)): map_text(v, change) for k, v in value.items()}
        case list() | tuple():
            return [map_text(v, change) for v in value]
    return value


def _bytes(file: Path, most: int) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is gzipped, `most` of them at most."""
    total = 0
    try:
        with file.open("rb") as stream:
            packed = stream.read(2) == _GZIP
            stream.seek(0)
            chunks = iter(lambda: stream.read(_CHUNK), b"")
            for chunk in _unpacked(chunks, file) if packed else chunks:
                total += len(chunk)
                if total > most:
                    raise InputError(
                        f"{file} holds more than {most:,} bytes"
                        f"{' when unpacked' if packed else ''}: too many to read"
                    )
                yield chunk
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _unpacked(chunks: Iterable[bytes], file: Path) -> Iterator[bytes]:
    """What a gzip stream of one or more members holds, a bounded piece at a time."""
    member = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            left = chunk
            while left:
                if member.eof:
                    if not left.strip(b"\0"):  # padding after the last member
                        break
                    member = zlib.decompressobj(wbits=31)
                yield member.decompress(left, _CHUNK)
                left = member.unconsumed_tail or member.unused_data
    except zlib.error as error:
        raise InputError(f"{file} cannot be unpacked ({error}): get it again") from None
    # What is still held back comes in pieces no larger than those before.
    while not member.eof:
        piece = member.decompress(b"", _CHUNK)
        if not piece:
            raise InputError(f"{file} is cut short: get it again")
        yield piece


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"an object has the key {clean(twice)[:60]!r} twice")
    return made


def _number(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _is_control(character: str) -> bool:
    # Bidirectional overrides and isolates reorder what stands beside them.
    code = ord(character)
    return code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def _made_here(folder: Path) -> bool:
    if not any(folder.iterdir()) or (folder / MARK).is_file():
        return True
    # Of delphi's layout every entry is a folder: a mark beside them would be taken for one.
    marks = [entry / "config.json" for entry in folder.iterdir()]
    return all(m.is_file() and b'"gemscope"' in m.read_bytes()[: 2**20] for m in marks)


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
