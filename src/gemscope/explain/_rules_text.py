"""The words of a rule."""

from collections.abc import Callable, Sequence

_KINDS = {
    "word": "letters", "keyword": "a keyword", "number": "a number", "sign": "a sign",
    "both": "signs and letters in one", "line": "a line break", "space": "spaces",
    "bytes": "part of a character", "special": "a special token", "": "the start of the context",
}  # fmt: skip
_CASES = {
    "lower": "in lower case", "upper": "in capitals", "capital": "capitalised",
    "mixed": "in mixed case", "": "without letters",
}  # fmt: skip
_SPACES = {"none": "with no space before", "space": "with a space before", "line": "on a new line"}
_SORTS = {"letter": "a letter", "digit": "a digit", "line": "a line break", "space": "a space",
          "": "nothing visible", "w": "a word", "cut": "what is not known"}  # fmt: skip
_MODES = {
    "code": "outside strings and comments", "comment": "in a comment (after `#`)",
    "string": "inside a string", "triple": "inside a triple-quoted string",
}  # fmt: skip
_EFFECTS = {
    "opens a string": "opening a string", "closes a string": "closing a string",
    "opens a bracket": "opening a bracket", "closes a bracket": "closing a bracket",
    "": "opening and closing nothing",
}  # fmt: skip
_BRACKETS = {
    "call": "in a call's arguments", "parameters": "in the parameters of a `def`",
    "bases": "in the bases of a `class`", "group": "in parentheses", "index": "in an index",
    "list": "in a list's brackets", "braces": "in braces", "": "outside brackets",
}  # fmt: skip
_PIECES = {0: "outside words", 1: "at the beginning of a word", 2: "in second place in a word",
           3: "in third place in a word", 4: "in fourth or a later place in a word"}  # fmt: skip
_LONGEST = 30

Value = str | int
Values = Sequence[Value]
Phrase = Callable[[Values], str]


def visible(text: str) -> str:
    """A token in backquotes, its white space made visible: `·` for a space, `⏎`, `⇥`."""
    marked = text.translate({ord("\n"): "⏎", ord("\r"): "⏎", ord("\t"): "⇥", ord("`"): "ˋ"})
    bare = marked.strip(" ")
    if bare:
        left = len(marked) - len(marked.lstrip(" "))
        right = len(marked) - len(marked.rstrip(" "))
        marked = _spaces(left) + bare + _spaces(right)
    else:
        marked = _spaces(len(marked))
    printed = "".join(c if c.isprintable() else "�" for c in marked)
    return f"`{printed if len(printed) <= _LONGEST else printed[: _LONGEST - 1] + '…'}`"


def _spaces(count: int) -> str:
    return "·" * count if count < 4 else f"·×{count}"


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _quoted(values: Values) -> str:
    return listed([visible(str(v)) for v in values])


def _known(table: dict) -> Phrase:
    return lambda values: listed([table.get(v) or visible(str(v)) for v in values])


def _sorted_signs(values: Values) -> str:
    return listed([_SORTS[str(v)] if v in _SORTS else visible(str(v)) for v in values])


def _low(bin_: int) -> int:
    return bin_ if bin_ < 4 else 2 ** (bin_ - 2)


def _ranges(values: Values, *, binned: bool, last: int) -> str:
    """Runs of neighbouring bins as numbers: `0 to 2`, `8 or more`."""
    numbers = sorted(int(v) for v in values)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = []
    for first, end in runs:
        low, high = (_low(first), _low(end + 1) - 1) if binned else (first, end)
        if end >= last:
            words.append(f"{low} or more")
        else:
            words.append(str(low) if low == high else f"{low} to {high}")
    return listed(words)


def _numbers(before: str, after: str = "", *, binned: bool = True, last: int = 6) -> Phrase:
    return lambda values: before + _ranges(values, binned=binned, last=last) + after


def _or_none(phrase: Phrase, none: str, absent: Value = "") -> Phrase:
    def words(values: Values) -> str:
        given = [v for v in values if v != absent]
        parts = ([phrase(given)] if given else []) + ([none] if len(given) < len(values) else [])
        return " or ".join(parts)

    return words


def _place(values: Values) -> str:
    if list(values) == [0]:
        return "first in its line"
    return _numbers("after ", " tokens of its line")(values)


def _repeats(values: Values) -> str:
    if list(values) == [0]:
        return "not seen before in the context"
    return _numbers("seen ", " times before in the context")(values)


def _text(values: Values) -> str:
    return _or_none(lambda some: f"{_quoted(some)} (any spacing)", "white space")(values)


def _indent(values: Values) -> str:
    spaces = [4 * int(v) for v in sorted(values) if int(v) >= 0]
    words = [f"{s} or more" if s == 24 else str(s) for s in spaces]
    words += ["unknown"] if -1 in values else []
    return f"at indentation {listed(words)}"


def _before(values: Values) -> str:
    given = [v for v in values if v != "line"]
    parts = [f"right after {_sorted_signs(given)}"] if given else []
    return " or ".join(parts + (["first in its line"] if "line" in values else []))


_HEADS: dict[str, Phrase] = {
    "token": _quoted,
    "text": _text,
    "kind": _known(_KINDS),
}
_THAT: dict[str, Phrase] = {
    "case": _known(_CASES),
    "space": _known(_SPACES),
    "first": lambda values: f"beginning with {_sorted_signs(values)}",
    "last": lambda values: f"ending with {_sorted_signs(values)}",
    "initial": _or_none(
        lambda values: f"beginning with the letter {_quoted(values)}", "not beginning with a letter"
    ),
    "final": _or_none(
        lambda values: f"ending with the letter {_quoted(values)}", "not ending with a letter"
    ),
    "ending": _or_none(
        lambda values: f"with the ending {_quoted(values)}", "shorter than four letters"
    ),
    "piece": _known(_PIECES),
    "effect": _known(_EFFECTS),
}
_WHERE: dict[str, Phrase] = {
    "so_far": _or_none(
        lambda values: f"where the word so far is {_quoted(values)}", "at the end of no word"
    ),
    "token_1": lambda values: f"after {_quoted(values)}",
    "token_2": lambda values: f"two tokens after {_quoted(values)}",
    "followed": lambda values: f"where {_quoted(values)} followed the last such token",
    "followed_2": lambda values: f"where {_quoted(values)} followed the last such pair of tokens",
    "kind_1": lambda values: f"after {_known(_KINDS)(values)}",
    "kind_2": lambda values: f"two tokens after {_known(_KINDS)(values)}",
    "before": _before,
    "word_1": _or_none(lambda values: f"after the word {_quoted(values)}", "after no word"),
    "word_2": _or_none(lambda values: f"two words after {_quoted(values)}", "after one word"),
    "keyword": _or_none(
        lambda values: f"after {_quoted(values)} in its line", "with no keyword before in its line"
    ),
    "bracket": _known(_BRACKETS),
    "callee": _or_none(
        lambda values: f"in the arguments of {_quoted(values)}", "in no named call's arguments"
    ),
    "argument": _or_none(
        _numbers("after ", " commas in its brackets", binned=False, last=4), "outside brackets", -1
    ),
    "after": _or_none(
        lambda values: f"past {_quoted(values)} in its statement or argument",
        "before any `=` or `:` of its statement or argument",
    ),
    "opened": _or_none(
        _numbers("", " tokens after the opening bracket or quote"),
        "outside brackets and strings",
        -1,
    ),
    "depth": _numbers("inside ", " brackets", binned=False, last=4),
    "mode": _known(_MODES),
    "place": _place,
    "statement": _or_none(
        lambda values: f"in a statement that begins with {_quoted(values)}",
        "where a statement begins",
    ),
    "above": _or_none(
        lambda values: f"under a line that begins with {_quoted(values)}", "in the first line"
    ),
    "above_end": _or_none(
        lambda values: f"under a line that ends with {_sorted_signs(values)}", "in the first line"
    ),
    "indent": _indent,
    "block": _or_none(lambda values: f"in the body of {_quoted(values)}", "outside any block"),
    "position": _numbers("at token ", " of the context", last=99),
    "repeats": _repeats,
    "pair": lambda values: (
        "in a pair of tokens seen before in the context"
        if 1 in values
        else "in a pair of tokens new in the context"
    ),
}


def term_text(conditions: Sequence[tuple[str, Values, bool]]) -> str:
    """Conditions that hold together, each a channel, what is shown of its values, and whether
    negated, as one phrase: what token it is, then where it stands.
    """
    heads: list[str] = []
    rest: list[str] = []
    for tables, place in ((_HEADS, heads), (_THAT, rest), (_WHERE, rest)):
        for channel, phrase in tables.items():
            for name, values, negated in conditions:
                if name == channel:
                    place.append(_negated(phrase(values), negated, head=place is heads))
    if heads:
        start = heads[0] + "".join(f" that is {h}" for h in heads[1:])
    else:
        start = "a token" if any(n in _THAT for n, _, _ in conditions) else ""
    if rest and start:
        return f"{start} {', '.join(rest)}"
    return start or ", ".join(rest)


def _negated(phrase: str, negated: bool, *, head: bool) -> str:
    if not negated:
        return phrase
    return f"any token but {phrase}" if head else f"not {phrase}"
