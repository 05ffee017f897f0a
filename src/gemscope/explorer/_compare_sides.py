"""The texts of a comparison that a page may ask for: bundled ones, indexed ones, pasted ones.

Never a file: whoever can reach the pages could read what this machine holds.
"""

import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Literal

from gemscope import corpus
from gemscope.corpus import Document
from gemscope.errors import InputError
from gemscope.features import Source, Store, named

from ._limits import Limits

PRESETS = ("code", "docstrings", "tests", "miniature")
"""Bundled texts: three cut out of the running Python's library, and the held-out text."""
_TEXTS = 64
"""Pasted texts that are kept."""


@dataclass(frozen=True, slots=True)
class Side:
    """One text of a comparison."""

    name: str
    kind: Literal["preset", "indexed", "text"]
    what: str
    """The name of the bundled or indexed text, or the pasted text itself."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two sides the same."""
        return (
            self.name,
            self.kind,
            hashlib.sha256(self.what.encode("utf-8", "replace")).hexdigest(),
        )


class Pasted:
    """Pasted texts that are too long for the address of a page, by their hash."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, text: str) -> str:
        """The key of a text; those kept longest ago are forgotten."""
        self._limits.check_text(text)
        key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        with self._lock:
            self._texts[key] = text
            self._texts.move_to_end(key)
            while len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        return key

    def text(self, key: str) -> str:
        """A kept text."""
        with self._lock:
            if key not in self._texts:
                raise InputError("this pasted text is no longer kept; paste it again")
            return self._texts[key]


def side(given: str, pasted: Pasted, limits: Limits, text: str = "") -> Side:
    """A side from `NAME=SOURCE`; `text` is what `NAME=text:` stands for where it is not in it."""
    name, what = named(given)
    kind, colon, rest = what.partition(":")
    if kind == "text" and colon:
        rest = rest or text
        limits.check_text(rest)
        return Side(name if name != what else "pasted", "text", rest)
    if kind == "kept" and colon:
        return Side(name if name != what else "pasted", "text", pasted.text(rest))
    if kind == "indexed" and rest:
        return Side(name if name != what else rest, "indexed", rest)
    if what in PRESETS:
        return Side(name, "preset", what)
    raise InputError(
        f"{what[:80]!r} is not offered here: pages compare {', '.join(PRESETS)}, text of the index "
        "as indexed:NAME, and pasted text as text:...; files and data sets are for gemscope compare"
    )


def check(sides: tuple[Side, Side]) -> None:
    """Refuse sides that are one, or that cannot be looked at together."""
    a, b = sides
    if a.name == b.name:
        raise InputError(
            f"both texts are called {a.name}; give them names of their own: NAME=SOURCE"
        )
    if (a.kind == "indexed") != (b.kind == "indexed"):
        raise InputError(
            "text of the index is compared with text of the index, without the model; choose two "
            "indexed texts, or none"
        )


def source(one: Side) -> Source:
    """A side with its documents."""
    found = _preset(one.what) if one.kind == "preset" else _documents(one)
    if len(found) < 2:
        raise InputError(
            f"{one.name} is {len(found)} document{'' if len(found) == 1 else 's'}: documents are "
            "what is compared, so each side needs 2 or more; put a line of --- or an empty line "
            "between them"
        )
    return Source(one.name, found)


@cache
def _preset(name: str) -> list[Document]:
    # By its full name: a file called "code" where the server was started is not meant.
    return corpus.read_text(name if name == corpus.BUNDLED else f"{corpus.LIBRARY}:{name}")


def _documents(one: Side) -> list[Document]:
    """Pasted text, cut at lines of three dashes or more; without any, at empty lines."""
    ruled = re.search(r"(?m)^-{3,}[ \t]*$", one.what) is not None
    parts = re.split(r"(?m)^-{3,}[ \t]*$" if ruled else r"\n[ \t]*\n", one.what.replace("\r", ""))
    kept = [part.strip("\n") for part in parts if part.strip()]
    return [Document(f"{one.name}[{i}]", part) for i, part in enumerate(kept)]


def indexed_names(store: Store, address: str) -> list[str]:
    """Texts of an index that can be compared: where activations were kept, and there are two."""
    known = store.dictionary(address)
    kept = (store.folder / "activations" / known["collected"] / "index.json").is_file()
    names = [one["name"] for one in known.get("sources", ())]
    return names if kept and len(names) > 1 else []
