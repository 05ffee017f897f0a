"""From raw answers to labels and verdicts; the intervals of scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.explain import sanitise
from gemscope.explain._labels import LONGEST
from gemscope.explain._prompts import explain_prompt, judge_prompt, reminded, verdicts
from gemscope.explain._scores import balanced, graded
from gemscope.explain._windows import Window

GOOD = {
    "Label: closing parenthesis of a call": "closing parenthesis of a call",
    "closing parenthesis of a call.": "closing parenthesis of a call",
    '"the word def"': "the word def",
    "**Label:** `self` in a method": "`self` in a method",
    "Explanation: names of exceptions": "names of exceptions",
    "[EXPLANATION]: names of exceptions": "names of exceptions",
    "Final answer: **names of exceptions**": "names of exceptions",
    "<think>Let's see.\n\nMethod 1 ...</think>\n\nLabel: names of errors": "names of errors",
    "so it is names\n</think>\nnames of exceptions": "names of exceptions",
    "Let me think.\nThe examples show names.\nLabel: names of exceptions": "names of exceptions",
    "```\nnames of exceptions\n```": "names of exceptions",
    "- names of exceptions": "names of exceptions",
    "1. names of exceptions": "names of exceptions",
    "This feature fires on names of exceptions.": "names of exceptions",
    "The neuron strongly activates on names of exceptions": "names of exceptions",
    "“names of exceptions”": "names of exceptions",
    "Names  of\texceptions": "Names of exceptions",
    '"if" or "else"': '"if" or "else"',
    'the word "let\'s"': 'the word "let\'s"',
    "first argument of a call": "first argument of a call",
    "so-called dunder names": "so-called dunder names",
    "method 'get' of a mapping": "method 'get' of a mapping",
    "example code in docstrings": "example code in docstrings",
    "the token after `import`": "the token after `import`",
    "`import`": "import",
    "__init__": "__init__",
    "`__init__`": "__init__",
    "_names of exceptions_": "names of exceptions",
    "names of __dunder__ methods": "names of __dunder__ methods",
    "<<def>> at the start of a line": "def at the start of a line",
    "步骤的编号": "步骤的编号",
    "there, their and they're": "there, their and they're",
    "examples of usage": "examples of usage",
    "etc...": "etc...",
}
LEAKED = [
    "Method 1 (MAX_ACTIVATING_TOKENS): the tokens are", "Method 2 fails", "Method 1: common",
    "Let's look at the tokens", "Let’s analyze", "Let me think", "let us see what is common",
    "The activating tokens are all verbs", "the max activating tokens are: foo",
    "The top positive logits are names", "The tokens are mostly nouns", "All examples show dates",
    "These examples all contain numbers", "Okay, so we have", "OK the tokens", "Hmm", "Sure! Names",
    "First, I look at the tokens", "Step 1: list the tokens", "Approach 2 works better",
    "We need to find the pattern", "We are given tokens", "I think it is names", "I'm not sure",
    "I'll analyze", "You are given a list", "Looking at the examples", "Based on the texts, names",
    "Analyzing the tokens", "Given the examples above", "To find the pattern", "Here is the label",
    "Here's the label", "The following is a label", "The user wants a label", "There is no pattern",
    "It seems to be names", "This appears to be about dates", "Sorry, I cannot help",
    "As an AI language model", "Unknown", "None", "N/A", "No clear pattern", "Wait, no",
    "MAX_ACTIVATING_TOKENS: foo", "TOP_ACTIVATING_TEXTS", "Looking through them",
]  # fmt: skip
UNUSABLE = {
    "": "it is empty",
    "Label:": "it is empty",
    "<think>and so on": "it is empty",
    "one thing\nand another": "it has more than one line",
    "Label: one thing\nand another": "it has more than one line",
    "x" * (LONGEST + 1): "longer than 120",
    "word " * 21: "or 20 words",
    "12 34 !!": "it has no word",
    "names \x1b[31m of": "cannot be shown",
    '{"label": "names"}': "it is no description",
    "Which names?": "it is no description",
}


@pytest.mark.parametrize("raw", GOOD)
def test_labels_are_freed_of_what_is_around_them(raw):
    assert sanitise(raw).text == GOOD[raw]


@pytest.mark.parametrize("raw", LEAKED)
def test_thoughts_are_no_labels(raw):
    found = sanitise(raw)
    assert not found.text
    assert "thinks aloud" in found.problem
    assert sanitise(f"Label: {raw}").text == ""


@pytest.mark.parametrize("raw", UNUSABLE)
def test_unusable_answers_say_why(raw):
    found = sanitise(raw)
    assert not found.text
    assert UNUSABLE[raw] in found.problem


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab.\"'*_`#<>[]:\n \t\u2028\x00Label think/"), max_size=60))
def test_any_answer_is_a_short_line_or_none(raw):
    found = sanitise(raw)
    assert bool(found.text) != bool(found.problem)
    assert len(found.text.splitlines()) <= 1
    assert len(found.text) <= LONGEST
    # What is a label stays one.
    if found.text:
        assert sanitise(found.text).text.strip(".") in found.text


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("The list: [1,0,1].", [True, False, True]),
        ("<think>[0, 0, 0]</think>[1, 0, 1]", [True, False, True]),
        ("First [0,0,0], no: [1,0,1]", [True, False, True]),
        ('["yes", "no", "Yes"]', [True, False, True]),
        ("[true, false, true]", [True, False, True]),
        ("1: yes\n2: no\n3: yes", [True, False, True]),
        ("1. 1\n2. 0\n3. 1", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 1, 1]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, maybe]", None),
        ("1: yes\n2: no", None),
        ("2: yes\n1: no\n3: no", None),
        ("1", None),
        ("yes", None),
        ("", None),
        ("[" * 10_000, None),
    ],
)
def test_verdicts_are_read_without_guessing(answer, found):
    assert verdicts(answer, 3) == found


def test_a_single_verdict_may_be_bare():
    assert verdicts("Yes.", 1) == [True]
    assert verdicts("0", 1) == [False]
    assert verdicts("perhaps", 1) is None


def window(pieces, values):
    return Window(0, 0, tuple(pieces), tuple(map(float, values)))


def test_marks_are_what_fires_and_nothing_in_the_text():
    one = window(["a", " <<", "b\n", "c", " >>>", ""], [0, 0, 2, 1, 0.5, 0])
    assert one.marked().marks == (False, False, True, True, False, False)
    assert one.marked().written() == "a < < <<b⏎c>> > > >"
    assert one.written() == "a < <b⏎c > > >"
    edges = window(["<", "<", ">", "x", ">"], [0, 1, 1, 0, 0]).marked()
    assert edges.written() == "< << <> >>x>"
    for text in (one.marked().written(), edges.written()):
        assert text.count("<<") == text.count(">>") == 1
    assert one.plain() == "a <<b⏎c >>>"


def test_random_marks_are_as_many_and_elsewhere():
    rng = np.random.default_rng(0)
    one = window("abcdefgh", [0, 3, 2, 0, 0, 0, 0, 0.1])
    seen = set()
    for _ in range(100):
        wrong = one.mismarked(rng)
        assert sum(wrong.marks) == sum(one.marked().marks) == 2
        assert not any(w and r for w, r in zip(wrong.marks, one.marked().marks, strict=True))
        seen |= {i for i, on in enumerate(wrong.marks) if on}
    assert seen == {0, 3, 4, 5, 6, 7}
    assert window("abc", [1, 1, 0]).mismarked(rng) is None


def test_prompts_hold_texts_and_numbers_as_they_are():
    one = window(["{x}", " y"], [0, 4]).marked()
    (_, system), (role, user) = explain_prompt([one], [" z"])
    assert (role, "Label:" in system) == ("user", True)
    assert user.splitlines()[0] == "1. {x}<< y>>"
    assert user.splitlines()[1] == '   " y" 10'
    assert '" z"' in user
    asked = judge_prompt("a {label}\nof two lines", [one, one])[1][1]
    assert "a {label} of two lines" in asked
    assert "1. {x}<< y>>\n2. {x}<< y>>" in asked
    again = reminded(explain_prompt([one]), "x" * 5_000, "it is empty")
    assert len(again[-2][1]) < 1_100
    assert "it is empty" in again[-1][1]


def test_the_interval_of_balanced_accuracy_covers():
    rng = np.random.default_rng(1)
    yes, no, n = 0.8, 0.6, 20
    covered = 0
    for _ in range(2_000):
        value, low, high = balanced([(rng.binomial(n, yes), n), (rng.binomial(n, no), n)])
        assert low <= value <= high
        covered += low <= (yes + no) / 2 <= high
    # Of 2,000 draws at 95% the standard error is 0.5%.
    assert 0.93 <= covered / 2_000 <= 0.98


def test_unreadable_answers_are_wrong_on_either_side():
    truth = np.array([True, True, False, False])
    right, value, _, _ = graded([True, None, False, None], truth)
    assert right.tolist() == [True, False, True, False]
    assert value == 0.5
    assert graded([None] * 4, truth)[1] == 0.0
