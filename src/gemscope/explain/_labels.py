"""From what a model answered to a label, or to a reason why there is none in it."""

import re
from dataclasses import dataclass

LONGEST = 120
"""Characters of a label."""
_WORDS = 20

_THOUGHT = re.compile(r"<(think|thinking|reasoning|thought)>.*?(</\1>|\Z)", re.DOTALL | re.I)
_AFTER_THOUGHT = re.compile(r".*</(?:think|thinking|reasoning|thought)>", re.DOTALL | re.I)
_TAG = re.compile(
    r"^[\s>*_#`-]*\[?\s*(?:final\s+)?(?:explanation|label|answer|description)\s*\]?[*_`]*"
    r"\s*(?:is\s*)?:[*_`]*", re.I | re.M
)  # fmt: skip
_WRAPPED = re.compile(
    r"""(?P<open>\*\*|__|[*_`"'])(?P<inside>(?:(?!(?P=open)).)+)(?P=open)"""
    r"|“(?P<curly>[^“”]+)”|‘(?P<single>[^‘’]+)’|«(?P<angle>[^«»]+)»|\[(?P<square>[^\[\]]+)\]"
)
_LEAD = re.compile(
    r"^(?:this|the) (?:feature|neuron|latent) (?:\w+ly )?"
    r"(?:fires|activates|responds|is active|is activated|detects|represents|captures)"
    r"(?: (?:on|for|to|at|in|by|when it sees))?\s+", re.I
)  # fmt: skip
# What leaks where a model thinks aloud: openers of a method, of talk to oneself or to the user.
_OPENER = re.compile(
    r"""^(?:
      (?:method|step|approach|option|strategy|example|examples|list|task|answer)\s*\#?\d+\b
    | let['’]?s\b | let\ (?:me|us)\b | (?:ok|okay|alright|sure|certainly|hmm+|well|wait|so|now|first
      |firstly|first\ of\ all|next|then|finally|therefore|thus|hence|great|yes|no|right)\s*[,.!:]
    | (?:ok|okay|alright|hmm+)\b | of\ course\b
    | (?:we|i|you)\ (?:need|are|have|should|must|can|will|would|see|think|notice|observe|want|know
      |look|start|begin|found|believe|could|cannot|can['’]t|don['’]t|do\ not|was|am)\b
    | (?:i|we)['’](?:m|ll|ve|d|re)\b | (?:looking|based|judging|going)\ (?:at|on|from|by|through)\b
    | (?:analy[sz]ing|considering|examining|given)\ (?:the|these|this|all|that)\b
    | to\ (?:find|determine|identify|figure|explain|summari[sz]e|analy[sz]e|answer|solve)\b
    | (?:here|below|following)\ (?:is|are)\b | here['’]?s\b | the\ following\b
    | (?:the|all|these|those|most|many)\ (?:\w+\ ){0,2}(?:token|example|text|highlight|activation
      |pattern|mark|list|snippet|word|phrase|instruction|prompt|logit)s?
      \ (?:\w+\ )?(?:is|are|show|shows|all|include|includes|seem|seems|appear|appears|contain
      |contains|have|has|do|does|suggest|suggests|indicate|indicates|list|lists)\b
    | (?:the\ )?(?:user|assistant)\ (?:wants|asks|asked|is\ asking|says|gave|provides)\b
    | (?:top|max|maximally)[\s_-]*activating | (?:there|it|this|that|they)\ (?:is|are|seems?
      |appears?|looks?|might|may|could|would|suggests?)\b
    | sorry\b | unfortunately\b | as\ an?\ (?:ai|language)\b | unable\ to\b
    | (?:unknown|unclear|none|null|nothing|n/?a|undefined
      |no\ (?:explanation|label|pattern|clear)\b.*)\s*\.?$
    )""",
    re.I | re.X,
)


@dataclass(frozen=True, slots=True)
class Label:
    """A label, or why an answer is none: one of the two is empty."""

    text: str
    problem: str = ""


def sanitise(raw: str) -> Label:
    """The label in an answer: one short line that says something, without wrapping or thoughts."""
    text = _AFTER_THOUGHT.sub("", _THOUGHT.sub("", raw)).strip()
    if tags := list(_TAG.finditer(text)):
        # What stands behind the last tag is the answer; what stands before it led there.
        text = text[tags[-1].end() :]
    text = re.sub(r"^```\w*\n|\n?```$", "", text.strip()).strip()
    if not text:
        return Label("", "it is empty")
    if len(text.splitlines()) > 1:
        return Label("", "it has more than one line")
    text = re.sub(r"^(?:[-*•]|\d{1,2}[.)])\s+", "", text.replace("<<", "").replace(">>", ""))
    text = text.replace("**", "")
    text = _LEAD.sub("", _unwrapped(text))
    return Label("", problem) if (problem := _problem(text)) else Label(text)


def _unwrapped(text: str) -> str:
    """Without what is around all of it: quotes, emphasis, a heading's marks, a full stop."""
    text = re.sub(r"\s+", " ", text).strip().lstrip("#").strip()
    while True:
        found = _WRAPPED.fullmatch(text)
        inner = next(g for g in found.group(*_GROUPS) if g).strip() if found else text
        # Underscores around a single word are part of a name.
        if found and found["open"] in ("_", "__") and " " not in inner:
            inner = text
        if inner.endswith(".") and not inner.endswith(".."):
            inner = inner[:-1].rstrip()
        if inner == text:
            return text
        text = inner


_GROUPS = ("inside", "curly", "single", "angle", "square")


def _problem(text: str) -> str:
    if not re.search(r"[^\W\d_]", text):
        return "it has no word"
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c == "\ufffd" for c in text):
        return "it has characters that cannot be shown"
    if len(text) > LONGEST or len(text.split()) > _WORDS:
        return f"it is longer than {LONGEST} characters or {_WORDS} words"
    if _OPENER.match(text):
        return "it thinks aloud instead of naming"
    if text[0] in "{[<" or text.endswith((":", "?")):
        return "it is no description"
    return ""
