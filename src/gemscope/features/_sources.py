"""Named texts from what a command was given."""

import re
from collections.abc import Sequence

from gemscope import corpus
from gemscope.errors import InputError

from ._text import Source

_HELD_OUT = 60_000
"""Tokens up to which the bundled held-out text is enough by itself."""


def sources_of(
    text: Sequence[str] = (), dataset: Sequence[str] = (), *, tokens: int | None = None
) -> list[Source]:
    """The texts `NAME=WHAT` or `WHAT`, as `corpus.read_text` and `corpus.read_dataset` read them.

    Nothing given is the bundled held-out text, and the running Python's library beside it where
    more `tokens` are wanted than the first can give.
    """
    if not text and not dataset:
        found = [Source("held-out", corpus.read_text(corpus.BUNDLED))]
        if tokens is None or tokens > _HELD_OUT:
            found.append(Source("library", corpus.read_text(corpus.LIBRARY)))
        return found
    found = []
    for given, read in ((text, corpus.read_text), (dataset, corpus.read_dataset)):
        for one in given:
            name, what = named(one)
            found.append(Source(name, read(what)))
    if len({source.name for source in found}) != len(found):
        names = ", ".join(source.name for source in found)
        raise InputError(f"texts need names of their own, and these are {names}; write NAME=TEXT")
    return found


def named(text: str) -> tuple[str, str]:
    """The name and the rest of `NAME=WHAT`; without a name, what is read is its own."""
    match = re.fullmatch(r"([\w .+-]{1,40})=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, text)
