"""What rules can be made of: every answer against another way to find it."""

import io
import re
import tokenize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import slowly, text_of

from gemscope.corpus import read_text
from gemscope.explain import Condition, Conditions, Rule
from gemscope.explain._conditions import CHANNELS
from gemscope.explain._conditions_lexer import NAMES, Lexer
from gemscope.features import token_pieces

ODD = {
    "prose": "It's 5 o'clock, isn't it? (Not yet, she said.) \"Come in\", C# and #1 of John's.\n"
    * 3,
    "chinese": "今天天气很好。我们去公园吧！今天天气很好，你呢？\n" * 4,
    "emoji": "ok 😀😀 👩‍👩‍👧 fine 🏳️‍🌈\t\x00\x0b end\r\nnext\rlast",
    "html": "<bos><b>&amp;</b><script>alert('x')</script> <eos> \\' \"\"\" ''' `",
    "code": "def f(self, x=1):\n    return {'a': [x, self.b(x == 2)]}  # done\n\nf(f(1), x=f)\n"
    * 2,
}


@pytest.fixture(scope="module")
def tokenizer(miniature):
    return miniature.tokenizer


@pytest.fixture(scope="module")
def odd(tokenizer):
    text = text_of(tokenizer, ODD)
    return text, Conditions.of(text, tokenizer)


def answers(channel, content):
    """The channel's answers for pieces as a tokenizer might cut them, the last of equal ones."""
    lexer, pieces = Lexer(), re.findall(r" ?\w+| ?[^\w\s]|\s+?(?=\n| ?\S|$)", content)
    assert "".join(pieces) == content
    return {piece: lexer.feed(piece)[NAMES.index(channel)] for piece in pieces}


@pytest.mark.parametrize(
    "channel",
    [
        "token",
        "token_1",
        "token_2",
        "text",
        "position",
        "repeats",
        "pair",
        "followed",
        "followed_2",
    ],
)
@pytest.mark.parametrize("negated", [False, True])
def test_tokens_and_their_repetition_are_read_as_one_place_at_a_time_would(
    channel, negated, odd, tokenizer
):
    text, found = odd
    row = CHANNELS.index(channel)
    assert len(found.values[row]) > 1
    for value in found.values[row][:40]:
        rule = Rule(((Condition(channel, (value,), negated),),))
        # Of a decoder that shows part of a character otherwise, the text alone is not compared.
        if value == "�":
            continue
        assert (rule.holds(found) == slowly(rule, text, tokenizer)).all(), value


def test_every_place_has_one_of_the_answers_of_every_channel(odd):
    text, found = odd
    assert found.codes.shape == (len(CHANNELS), len(text.ids))
    for codes, values in zip(found.codes, found.values, strict=True):
        assert 0 <= codes.min() <= codes.max() < len(values)
        assert len(set(values)) == len(values)


def test_nothing_looks_ahead(tokenizer):
    documents = {d.path: d.text[:6000] for d in read_text("miniature")[:2]} | ODD
    whole = {path: Conditions.of(text_of(tokenizer, {path: t}, context=300), tokenizer)
             for path, t in documents.items()}  # fmt: skip
    for path, content in documents.items():
        full = text_of(tokenizer, {path: content}, context=300)
        for size in np.random.default_rng(0).integers(1, len(full.ids), 4):
            contexts = int(np.searchsorted(full.offsets, size))
            part = type(full)(
                ids=full.ids[:size], counts=full.counts[:size],
                offsets=np.append(full.offsets[:contexts], size),
                document=full.document[:contexts], start=full.start[:contexts],
                paths=full.paths, sources=full.sources, source=full.source,
            )  # fmt: skip
            found = Conditions.of(part, tokenizer)
            for row, name in enumerate(CHANNELS):
                # A character of several tokens is shown whole only if its last one is there.
                here = [found.values[row][c] for c in found.codes[row][: size - 4]]
                there = [whole[path].values[row][c] for c in whole[path].codes[row][: size - 4]]
                assert here == there, name


def spans(source):
    """Strings and comments of Python source and brackets open, by Python's own tokenizer: for each
    number of characters read, `mode` and depth, or None inside what opens or closes.
    """
    lines = np.cumsum([0] + [len(line) for line in source.splitlines(keepends=True)])
    out = [["code", 0] for _ in range(len(source) + 1)]
    depth, begun = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, end = (int(lines[row - 1]) + column for row, column in (token.start, token.end))
        for place in range(begun, end):
            out[place + 1][1] = depth
        begun = end
        if token.type == tokenize.COMMENT:
            for place in range(first + 1, end + 1):
                out[place][0] = "comment"
        elif token.type == tokenize.STRING:
            lead = len(token.string) - len(token.string.lstrip("rRbBuUfF"))
            quotes = 3 if token.string[lead : lead + 3] in ('"""', "'''") else 1
            for place in range(first + 1, end):
                inside = first + lead + quotes <= place
                sure = inside and (quotes == 1 or place <= end - 3)
                out[place][0] = ("triple" if quotes == 3 else "string") if sure else None
        elif token.string in ("(", "[", "{"):
            depth += 1
        elif token.string in (")", "]", "}"):
            depth -= 1
        out[end][1] = depth
    for place in range(begun, len(source)):
        out[place + 1][1] = depth
    return out


@pytest.mark.parametrize("path", ["types.py", "multiprocessing/heap.py", "_osx_support.py"])
def test_the_lexer_reads_python_as_python_does(path, tokenizer):
    (source,) = (d.text for d in read_text("miniature") if d.path == path)
    wanted = spans(source)
    lexer, read, seen = Lexer(), 0, set()
    for piece in token_pieces(tokenizer, tokenizer(source)["input_ids"][1:]):
        said = dict(zip(NAMES, lexer.feed(piece), strict=True))
        read += len(piece)
        mode, depth = wanted[read]
        if mode is None:
            continue
        seen.add(mode)
        assert said["mode"] == mode, (read, source[read - 60 : read])
        assert said["depth"] == min(depth, 4), (read, source[read - 60 : read])
    assert read == len(source)
    assert seen == {"code", "comment", "string", "triple"}


@pytest.mark.parametrize(
    ("channel", "content", "token", "wanted"),
    [
        ("callee", "x = isinstance(a, 'b')", "a", "isinstance"),
        ("callee", "x = isinstance(a, 'b')", "b", "isinstance"),
        ("bracket", "def foo(a, b): pass", " b", "parameters"),
        ("bracket", "class A(Base): pass", ")", ""),
        ("bracket", "if (a and b): pass", " and", "group"),
        ("bracket", "x = [a, b]", " b", "list"),
        ("bracket", "x = y[a]", "a", "index"),
        ("bracket", "# not (in brackets", " brackets", ""),
        ("argument", "f(a, g(b, c), d)", " c", 1),
        ("argument", "f(a, g(b, c), d)", " d", 2),
        ("after", "f(a, b=c)", "c", "="),
        ("after", "f(a, b==c, d)", " d", ""),
        ("after", "f(a, b==c)", "c", ""),
        ("after", "x = y", " y", "="),
        ("after", "if x != y: z", " y", ""),
        ("keyword", "for i in x: pass", " x", "in"),
        ("statement", "from x import (a,\n    b,\n    c)", " c", "from"),
        ("above", "def f(x):\n    return x", " return", "def"),
        ("above_end", "def f(x):\n    return x", " return", ":"),
        ("above_end", "x = 1\n\n\ny = 2", "y", "blank"),
        ("block", "class A:\n    def f(x):\n        return x\n    y = 1", " return", "def"),
        ("block", "class A:\n    def f(x):\n        return x\n    y = 1", " y", "class"),
        ("indent", "class A:\n    def f(x):\n        return x", " return", 2),
        ("before", "self.name", "name", "."),
        ("before", "a = -> b", " b", "->"),
        ("word_1", "except OSError: pass", " OSError", "except"),
        ("word_2", "except OSError: pass", " pass", "except"),
        ("mode", "it's a dog's life", " life", "code"),
        ("mode", "say 'so it is' now", " it", "string"),
        ("mode", "say 'so it is' now", " now", "code"),
        ("mode", "x = r'a\\' + b", " b", "string"),
        ("mode", "x = '' + b", " b", "code"),
        ("mode", "C# and F#", " and", "code"),
        ("mode", "x # why", " why", "comment"),
        ("mode", 'x = """a "quoted" word""" + b', " word", "triple"),
        ("mode", 'x = """a "quoted" word""" + b', " b", "code"),
        ("effect", "x = 'a'", " '", "opens a string"),
        ("so_far", "    isinstance(x, y)", " isinstance", "isinstance"),
        ("place", "x = 1\n    return y", " y", 1),
    ],
)  # fmt: skip
def test_a_place_is_described_as_a_reader_would(channel, content, token, wanted):
    found = answers(channel, content)
    assert found[token] == wanted, found


def test_a_context_goes_on_where_the_last_one_ended_only_if_it_follows_it(tokenizer):
    content = 'x = 1\n"""Some words\n' + "about nothing at all, and more of it\n" * 20 + '"""\n'
    text = text_of(tokenizer, {"a": content, "b": content}, context=40)
    found, row = Conditions.of(text, tokenizer), CHANNELS.index("mode")
    mode = [found.values[row][code] for code in found.codes[row]]
    second = int(text.offsets[1])
    assert mode[second + 1 : second + 30] == ["triple"] * 29
    kept = [0, 2]  # the second context is missing: what the third is inside of is not known
    gap = text_of(tokenizer, {"a": content}, context=40)
    parts = [slice(int(gap.offsets[c]), int(gap.offsets[c + 1])) for c in kept]
    holed = type(gap)(
        ids=np.concatenate([gap.ids[p] for p in parts]),
        counts=np.concatenate([gap.counts[p] for p in parts]),
        offsets=np.array([0, 40, 80]), document=gap.document[kept], start=gap.start[kept],
        paths=gap.paths, sources=gap.sources, source=gap.source,
    )  # fmt: skip
    found = Conditions.of(holed, tokenizer)
    assert found.values[row][found.codes[row][60]] == "code"


def test_a_docstring_that_began_before_the_text_is_ended_by_its_quotes():
    lexer = Lexer(cut=True)
    for piece in ["more", " of", " it", ".\n", '   """', "\n", "   return", " x"]:
        said = dict(zip(NAMES, lexer.feed(piece), strict=True))
    assert said["mode"] == "code"
    assert said["statement"] == "return"


PIECES = st.lists(
    st.sampled_from([*"ab1_ \n\t'\"#()[]{},:=\\.!é中", '"""', "'''", "def", "if ", "\r\n", "="]),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(PIECES, st.lists(st.integers(0, 40), max_size=8))
def test_what_is_open_does_not_depend_on_how_the_text_is_cut_into_tokens(pieces, cuts):
    whole = "".join(pieces)
    ends = sorted({min(c, len(whole)) for c in cuts} | {len(whole)})
    one, many = Lexer(), Lexer()
    for character in whole:
        by_character = one.feed(character)
    said, begin = (), 0
    for end in ends:
        said, begin = many.feed(whole[begin:end]), end
    if whole and len(ends) > 1 and ends[-1] > ends[-2]:
        names = ("mode", "bracket", "callee", "depth", "argument", "after", "so_far", "indent",
                 "block", "statement", "above", "above_end")  # fmt: skip
        for name in names:
            at = NAMES.index(name)
            # A line break of two characters, cut in two, is two line breaks.
            if "\r" not in whole:
                assert said[at] == by_character[at], name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=20))
def test_any_text_can_be_read(pieces):
    lexer = Lexer()
    for piece in pieces:
        assert len(lexer.feed(piece)) == len(NAMES)
