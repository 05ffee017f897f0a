"""What may be said of a token and its surroundings, for every token of a text.

A *channel* is one question ("which token is it", "what kind of bracket is it in"), with one answer
for each place; a condition of a rule is a channel and some of its values. Nothing looks ahead: a
causal model cannot either. Places are those of `Text`; contexts are read in order, and what the
lexer knows carries over where two of them follow each other in their document.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gemscope.features import Text, token_pieces

from ._conditions_lexer import KEYWORDS, NAMES, Lexer

Value = str | int
"""An answer: a token's id, a word, a name of a class, or the number of a bin."""

TOKENS = ("token", "token_1", "token_2", "followed", "followed_2")
"""Channels whose values are ids: the token, the one before, the one before that; what followed the
last equal token of the context, and the last equal pair of tokens.
"""
NUMBERED = frozenset({*TOKENS, "depth", "argument", "opened", "piece", "indent", "place",
                      "position", "repeats", "pair"})  # fmt: skip
"""Channels whose values are numbers: ids, counts, or bins of counts. Those of others are text."""
_OF_TOKEN = ("text", "kind", "case", "space", "first", "last", "initial", "final", "ending")
CHANNELS = (*TOKENS, *_OF_TOKEN, "kind_1", "kind_2", "position", "repeats", "pair", *NAMES)
"""Every channel, in the order of the rows of `Conditions.codes`."""

_LETTERS = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Conditions:
    """The answers of every channel at every place of a text."""

    codes: np.ndarray
    """int32 `[n_channels, n_places]`: the answer as an index into the channel's values."""
    values: list[list[Value]]
    """The values of each channel."""
    shown: dict[int, str] = field(repr=False)
    """The text of each token id that occurs."""

    @classmethod
    def of(
        cls, text: Text, tokenizer: Any, *, progress: Callable[[str, int, int], None] | None = None
    ) -> "Conditions":
        """Read `text`; about fifteen seconds for a million tokens."""
        ids, place = np.unique(text.ids, return_inverse=True)
        shown = {int(i): token_text(tokenizer, int(i)) for i in ids}
        special = {int(i) for i in tokenizer.all_special_ids}
        rows: dict[str, np.ndarray] = {}
        values: dict[str, list[Value]] = {}
        position = text.position

        def by_token(name: str, answers: Sequence[Value]) -> None:
            own, values[name] = _numbered(answers)
            rows[name] = own[place]

        by_token("token", [int(i) for i in ids])
        described = [_described(shown[int(i)], int(i) in special) for i in ids]
        for number, name in enumerate(_OF_TOKEN):
            by_token(name, [one[number] for one in described])
        for name, back in (("token", 1), ("token", 2), ("kind", 1), ("kind", 2)):
            to, absent = f"{name}_{back}", -1 if name == "token" else ""
            values[to] = [*values[name], absent]
            rows[to] = np.full(len(place), len(values[name]), dtype=np.int32)
            inside = np.flatnonzero(position >= back)
            rows[to][inside] = rows[name][inside - back]
        for name, answers in _repetition(text, position).items():
            rows[name], values[name] = _compact(answers)
        for name, follower in _followers(text, position).items():
            rows[name], values[name] = _compact(follower)
        rows["position"], values["position"] = _compact(_bins(position))
        for name, column in zip(NAMES, _read(text, tokenizer, progress), strict=True):
            rows[name], values[name] = _numbered(column)
        return cls(
            np.stack([rows[name] for name in CHANNELS]), [values[n] for n in CHANNELS], shown
        )

    @property
    def n_places(self) -> int:
        """Number of places, of the text."""
        return self.codes.shape[1]

    @cached_property
    def numbers(self) -> list[dict[Value, int]]:
        """Of each channel, the code of a value."""
        return [{value: code for code, value in enumerate(row)} for row in self.values]

    def at(self, places: np.ndarray) -> "Conditions":
        """The same at some places alone, numbered from 0."""
        return Conditions(np.ascontiguousarray(self.codes[:, places]), self.values, self.shown)

    def among(
        self, channel: str, wanted: Iterable[Value], places: np.ndarray | None = None
    ) -> np.ndarray:
        """Where the answer is one of `wanted`: bool, at every place or at `places`."""
        row = CHANNELS.index(channel)
        known = self.numbers[row]
        chosen = [known[value] for value in wanted if value in known]
        codes = self.codes[row] if places is None else self.codes[row][places]
        if len(chosen) == 1:
            return codes == chosen[0]
        table = np.zeros(len(self.values[row]), dtype=bool)
        table[chosen] = True
        return table[codes]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token by itself, its leading space included."""
    (piece,) = token_pieces(tokenizer, [token])
    # Some decoders drop the space that the first token of a text begins with.
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str) and name.startswith("▁") and not piece.startswith(" "):
        return f" {piece}"
    return piece


def _described(text: str, special: bool) -> tuple[str, ...]:
    """The values of `_OF_TOKEN` for a token's own text."""
    bare = text.strip()
    lead = text[: len(text) - len(text.lstrip())]
    space = "line" if re.search(r"[\r\n]", lead) else "space" if lead else "none"
    return (
        bare,
        "special" if special else _kind(text, bare),
        _case(bare),
        space,
        _sort(bare[:1]),
        _sort(text[-1:]),
        bare[:1].lower() if _LETTERS.match(bare) else "",
        bare[-1:].lower() if _LETTERS.match(bare[-1:]) else "",
        bare[-3:].lower() if len(bare) > 3 and bare.isalpha() else "",
    )


def _kind(text: str, bare: str) -> str:
    if not bare:
        return "line" if re.search(r"[\r\n]", text) else "space" if text else "bytes"
    if "�" in bare:
        return "bytes"
    if bare in KEYWORDS:
        return "keyword"
    if bare.isdigit():
        return "number"
    if re.fullmatch(r"\w+", bare):
        return "word"
    return "both" if re.search(r"\w", bare) else "sign"


def _case(bare: str) -> str:
    letters = "".join(_LETTERS.findall(bare))
    if not letters:
        return ""
    if letters.islower():
        return "lower"
    if letters.isupper():
        return "upper" if len(letters) > 1 else "capital"
    return "capital" if letters[1:].islower() and letters[0].isupper() else "mixed"


def _sort(sign: str) -> str:
    """A sign as it is, and the sort of anything else."""
    if not sign or sign in "\r\n":
        return "line" if sign else ""
    if sign.isspace():
        return "space"
    return "letter" if _LETTERS.match(sign) else "digit" if sign.isdigit() else sign


def _numbered(answers: Sequence[Value]) -> tuple[np.ndarray, list[Value]]:
    """Codes of `answers`, in order of appearance, and the values."""
    numbers: dict[Value, int] = {}
    codes = [numbers.setdefault(answer, len(numbers)) for answer in answers]
    return np.array(codes, dtype=np.int32), list(numbers)


def _compact(answers: np.ndarray) -> tuple[np.ndarray, list[Value]]:
    found, codes = np.unique(answers, return_inverse=True)
    return codes.astype(np.int32), [int(value) for value in found]


def _bins(counts: np.ndarray) -> np.ndarray:
    """0, 1, 2, 3, then 4 for 4 to 7, 5 for 8 to 15, and so on."""
    high = np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64)
    return np.where(counts < 4, counts, 2 + high)


def _repetition(text: Text, position: np.ndarray) -> dict[str, np.ndarray]:
    """How often each token, and each pair of tokens, stood earlier in its context."""
    single, pairs = _keys(text, position)
    return {
        "repeats": np.minimum(_bins(_rank(single)), 6),
        "pair": (_rank(pairs) > 0).astype(np.int64),
    }


def _followers(text: Text, position: np.ndarray) -> dict[str, np.ndarray]:
    """The token after the last equal one of the context, and after the last equal pair; -1 where
    there is none.
    """
    out = {}
    for name, keys in zip(("followed", "followed_2"), _keys(text, position), strict=True):
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        here, last = order[same], order[same - 1]
        out[name] = np.full(len(text.ids), -1, dtype=np.int64)
        out[name][here] = text.ids[last + 1]
    return out


def _keys(text: Text, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each token in its context, and for each pair: the same for the same."""
    context, ids = text.context.astype(np.int64), text.ids.astype(np.int64)
    size = int(ids.max(initial=0)) + 1
    # A context's first token is in a pair of its own.
    before = np.where(position > 0, np.concatenate(([0], ids[:-1])), size)
    return context * size + ids, (context * (size + 1) + before) * size + ids


def _rank(keys: np.ndarray) -> np.ndarray:
    """How many equal keys stand before each."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    lengths = np.diff(np.append(begins, len(keys)))
    out = np.empty(len(keys), dtype=np.int64)
    out[order] = np.arange(len(keys)) - np.repeat(begins, lengths)
    return out


def _read(
    text: Text, tokenizer: Any, progress: Callable[[str, int, int], None] | None
) -> list[tuple[Value, ...]]:
    """The columns of `NAMES`, by the lexer."""
    bos, lexer, end = tokenizer.bos_token_id, Lexer(), (-1, -1)
    special = {int(i) for i in tokenizer.all_special_ids}
    rows: list[tuple[Value, ...]] = []
    for context in range(text.n_contexts):
        here = slice(int(text.offsets[context]), int(text.offsets[context + 1]))
        ids = text.ids[here].tolist()
        begin = (int(text.document[context]), int(text.start[context]))
        first = 1 if ids[:1] == [bos] and bos is not None else 0
        if begin != end:
            lexer = Lexer(cut=begin[1] > 1)
        end = (begin[0], begin[1] + len(ids) - first)
        pieces = token_pieces(tokenizer, ids[first:])
        if first:
            rows.append(Lexer().feed(""))
        rows += [
            lexer.feed("" if token in special else piece)
            for token, piece in zip(ids[first:], pieces, strict=True)
        ]
        if progress is not None:
            progress("reading conditions", here.stop, len(text.ids))
    return list(zip(*rows, strict=True)) if rows else [()] * len(NAMES)
