"""Where a token stands in its text: a light lexer, one token after the other.

It knows quotes, `#`, brackets, lines and indentation, as most programming languages have them,
and takes nothing for granted: it never fails, reads prose as well as code, and looks at nothing
that comes after a token, since a causal model cannot either. What it says is literal ("after `#`
in the line", "between brackets"), so that it stays true of a text that is not a program.
"""

import keyword
import re
from dataclasses import dataclass, field

NAMES = (
    "mode", "effect", "bracket", "callee", "depth", "argument", "after", "opened", "so_far",
    "piece", "before", "word_1", "word_2", "keyword", "statement", "above", "above_end", "indent",
    "place", "block",
)  # fmt: skip
"""What is said of a token, in the order of `Lexer.feed`."""

KEYWORDS = frozenset(keyword.kwlist) - {"True", "False", "None"}
_HEADERS = {"def", "class", "if", "elif", "else", "for", "while", "with", "try", "except",
            "finally", "async"}  # fmt: skip
# Ideographs and kana are written without spaces: each is a word of its own.
_IDEOGRAPHS = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_ITEM = re.compile(
    rf"(?P<word>[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+)|(?P<line>\r\n?|\n)|(?P<space>[^\S\r\n]+)|(?P<sign>.)",
    re.DOTALL,
)
_PAIRS = {"->", "==", "!=", "<=", ">=", "+=", "-=", "**", "//", ":=", "*=", "..", "--"}
_CLOSES = {")": "(", "]": "[", "}": "{"}
_PREFIXES = {"r", "b", "f", "u", "rb", "br", "fr", "rf"}
_LONGEST_WORD = 40
_DEEPEST = 32


@dataclass(slots=True)
class _Bracket:
    sign: str
    kind: str
    callee: str
    token: int
    commas: int = 0
    after: str = ""


@dataclass(slots=True)
class Lexer:
    """State of one document's text; `cut` says that its beginning is not known."""

    cut: bool = False
    _mode: str = "code"
    _quote: str = ""
    _run: int = 0
    """Quotes of the string's own kind that stand side by side just now."""
    _escaped: bool = False
    _string_token: int = 0
    _word: str = ""
    _pieces: int = 0
    _words: tuple[str, str] = ("", "")
    _visible: str = ""
    """The last visible sign, `w` after a word, empty at the start of a line."""
    _before: str = ""
    _adjacent: bool = False
    _keyword: str = ""
    _first: str = ""
    _statement: str = ""
    _above: str = ""
    _above_end: str = ""
    _blank_lines: int = 0
    _column: int = 0
    _indent: int = 0
    _blank: bool = True
    _in_line: int = 0
    _after: str = ""
    _brackets: list[_Bracket] = field(default_factory=list)
    _blocks: list[tuple[int, str]] = field(default_factory=list)
    _effect: str = ""
    _token: int = 0
    _was_equal: str | None = None

    def __post_init__(self) -> None:
        if self.cut:  # somewhere in a line, and which is not known
            self._blank, self._indent, self._visible = False, -8, "cut"
            self._first = self._statement = "cut"

    def feed(self, piece: str) -> tuple[str | int, ...]:
        """Read the next token's text; the values of `NAMES` for it.

        Structure is as it stands after the token (what comes next stands in it); words, signs and
        the place in the line are those before it.
        """
        self._token += 1
        self._effect = ""
        items = list(_ITEM.finditer(piece))
        continues = bool(items and items[0].lastgroup == "word" and self._joins(items[0][0]))
        if items and not continues:
            self._end_word()
        words, key, place = self._words, self._keyword, self._in_line
        before = self._before if continues else (self._visible or "line")
        if not continues and items and items[0].lastgroup == "line":
            before = self._visible or "line"
        for item in items:
            kind = item.lastgroup
            if kind == "word":
                self._read_word(item[0])
            elif kind == "line":
                self._read_line()
            elif kind == "space":
                self._read_space(item[0])
            else:
                self._read_sign(item[0])
        self._in_line += 1
        top = self._brackets[-1] if self._brackets and self._mode != "comment" else None
        inside = self._string_token if self._mode in ("string", "triple") else None
        opened = inside if inside is not None else top.token if top else None
        return (
            self._mode, self._effect,
            "" if top is None else top.kind, "" if top is None else top.callee,
            min(len(self._brackets), 4), -1 if top is None else min(top.commas, 4),
            self._after if top is None else top.after,
            -1 if opened is None else _bin(self._token - opened),
            self._word, min(self._pieces, 4), before, *words, key,
            self._statement, self._above, self._above_end if self._blank_lines < 2 else "blank",
            self._level(), _bin(place),
            self._blocks[-1][1] if self._blocks else "",
        )  # fmt: skip

    def _level(self) -> int:
        # Fours, of which the next token may bring the last space; -1 where it is not known.
        return max(-1, min(((self._column if self._blank else self._indent) + 1) // 4, 6))

    def _joins(self, text: str) -> bool:
        return bool(self._word) and not (_is_ideograph(text) or _is_ideograph(self._word))

    def _end_word(self) -> None:
        if not self._word:
            return
        self._words = (self._word, self._words[0])
        if self._mode == "code" and self._word in KEYWORDS:
            self._keyword = self._word
        if not self._statement and self._mode == "code":
            self._statement = self._word
        if not self._first:
            self._first = self._word
        self._word, self._pieces = "", 0

    def _appear(self) -> None:
        """Something visible: the first of a line fixes its indentation."""
        self._was_equal = None
        if not self._blank:
            return
        self._blank, self._indent = False, self._column
        if self._mode == "code" and not self._brackets:
            while self._blocks and self._blocks[-1][0] >= self._indent:
                self._blocks.pop()

    def _read_word(self, text: str) -> None:
        joins = self._joins(text) and self._adjacent
        if not joins:
            self._end_word()
            self._before = self._visible or "line"
        self._appear()
        self._word = (self._word + text)[:_LONGEST_WORD]
        self._pieces += 1
        self._visible, self._adjacent = "w", True
        self._escaped, self._run = False, 0

    def _read_space(self, text: str) -> None:
        self._end_word()
        if self._blank:
            self._column += len(text.expandtabs(4))
        self._adjacent, self._run, self._escaped = False, 0, False
        self._was_equal = None

    def _read_line(self) -> None:
        self._end_word()
        if self._blank:
            self._blank_lines += 1
            if self._blank_lines >= 2 and self._mode == "code":
                self._brackets.clear()
        else:
            self._blank_lines = 1
            self._above, self._above_end = self._first, self._visible
        if self._mode == "comment" or (self._mode == "string" and not self._escaped):
            self._mode = "code"
        if self._mode == "code" and not self._brackets:
            if self._statement in _HEADERS and self._visible == ":":
                name = "def" if self._statement == "async" else self._statement
                self._blocks = [*self._blocks[-_DEEPEST:], (self._indent, name)]
            self._statement = self._after = ""
        self._blank, self._column, self._in_line = True, 0, -1
        self._first = self._visible = self._keyword = ""
        self._adjacent, self._run, self._escaped = False, 0, False

    def _read_sign(self, sign: str) -> None:
        self._end_word()
        word = self._words[0] if self._adjacent and self._visible == "w" else ""
        equal = self._was_equal
        before = self._visible
        self._appear()
        if self._mode in ("string", "triple"):
            self._in_string(sign)
        elif self._mode == "code":
            if not self._statement:
                self._statement = sign
            self._in_code(sign, word, equal)
        if not self._first:
            self._first = sign
        pair = before + sign
        self._visible = pair if self._adjacent and pair in _PAIRS else sign
        self._adjacent = True

    def _in_string(self, sign: str) -> None:
        if self._escaped:
            self._escaped = False
            return
        if sign == "\\":
            self._escaped, self._run = True, 0
            return
        if sign != self._quote:
            self._run = 0
            return
        self._run += 1
        if self._mode == "triple":
            if self._run >= 3:
                self._mode, self._effect, self._run = "code", "closes a string", 0
        else:
            # An empty string is closed at once; a third quote then opens a long one.
            empty = self._run == 2
            self._mode, self._effect = "code", "closes a string"
            self._run = 2 if empty else 0

    def _in_code(self, sign: str, word: str, equal: str | None) -> None:
        if sign in "\"'":
            self._open_string(sign, word)
            return
        self._run = 0
        if sign == "#":
            if not word:  # C# and a#b are none
                self._mode = "comment"
        elif sign in "([{":
            self._open_bracket(sign, word)
        elif sign in ")]}":
            if self._brackets and self._brackets[-1].sign == _CLOSES[sign]:
                self._brackets.pop()
            self._effect = "closes a bracket"
        elif sign == ",":
            if self._brackets:
                self._brackets[-1].commas += 1
            self._set_after("")
        elif sign == "=":
            self._read_equal(equal)
        elif sign == ":":
            self._set_after(":")

    def _open_string(self, sign: str, word: str) -> None:
        if self._run == 2 and sign == self._quote:
            self._run = 0
            if self._ends_unseen():
                self.cut = False
                return
            self.cut = False
            self._mode, self._effect, self._string_token = "triple", "opens a string", self._token
            return
        # An apostrophe stands after a letter; only the prefixes of strings may.
        if word and sign == "'" and word.lower() not in _PREFIXES:
            return
        self._mode, self._effect, self._string_token = "string", "opens a string", self._token
        self._quote, self._run = sign, 1

    def _ends_unseen(self) -> bool:
        """Whether a triple quote closes a string that began before the text that is known.

        It opens one in a fresh line under a line that ends in `:`, or behind an opening sign.
        """
        if not self.cut:
            return False
        if self._first in ('"', "'"):
            return self._above_end != ":" and bool(self._above)
        return self._keyword != "return" and self._after != "=" and not self._brackets

    def _open_bracket(self, sign: str, word: str) -> None:
        directly = self._adjacent and self._visible in (")", "]")
        kind, callee = {"(": "group", "[": "list", "{": "braces"}[sign], ""
        if sign == "[" and (word or directly):
            kind = "index"
        elif sign == "(" and ((word and word not in KEYWORDS) or directly):
            owner = self._words[1] if word else ""
            kind = {"def": "parameters", "class": "bases"}.get(owner, "call")
            callee = word if kind == "call" else ""
        self._effect = "opens a bracket"
        if len(self._brackets) < _DEEPEST:
            self._brackets.append(_Bracket(sign, kind, callee, self._token))

    def _read_equal(self, equal: str | None) -> None:
        if equal is not None:  # `==`: no assignment after all
            self._set_after(equal)
            return
        if self._adjacent and self._visible in ("!", "<", ">"):
            return
        self._was_equal = self._brackets[-1].after if self._brackets else self._after
        self._set_after("=")

    def _set_after(self, sign: str) -> None:
        if self._brackets:
            self._brackets[-1].after = sign
        else:
            self._after = sign


def _is_ideograph(text: str) -> bool:
    return "\u2e80" <= text[:1] <= "\u9fff" or bool(re.match(f"[{_IDEOGRAPHS}]", text))


def _bin(count: int) -> int:
    """0, 1, 2, 3, then 4 for 4 to 7, 5 for 8 to 15, 6 for more."""
    return count if count < 4 else min(1 + count.bit_length(), 6)
