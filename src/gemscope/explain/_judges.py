"""Who says whether an explanation fits a window: a language model, or the rule itself."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from gemscope.errors import InputError
from gemscope.features import Explanation

from ._asking import Asker
from ._chat import Request
from ._conditions import Conditions
from ._prompts import judge_prompt, verdicts
from ._rules import Rule
from ._windows import Window

_LIST_TOKENS = 4
"""Of an answer's entry in a list, at most."""


@runtime_checkable
class Judge(Protocol):
    """Says yes or no of windows."""

    name: str

    def judge(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """For each window: does it hold a token on which a feature so explained fires; of one with
        marks: are they those tokens? None where the answer could not be read.
        """
        ...


class ModelJudge:
    """A language model that sees nothing but the explanation's text and the windows."""

    def __init__(self, asker: Asker, *, per_prompt: int = 10, max_tokens: int = 400):
        self.asker, self.per_prompt, self.max_tokens = asker, per_prompt, max_tokens
        self.name = asker.chat.model

    def requests(self, explanation: Explanation, windows: Sequence[Window]) -> list[Request]:
        """What is asked of some windows, a few in each request."""
        return [
            Request(
                judge_prompt(explanation.text, part),
                self.max_tokens + _LIST_TOKENS * len(part),
                purpose=f"judge {explanation.dictionary}#{explanation.feature}",
            )
            for part in _parts(windows, self.per_prompt)
        ]

    def judge(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """As `Judge` says; an answer with another number of entries is of no use for any."""
        replies = self.asker.ask_all(self.requests(explanation, windows))
        out: list[bool | None] = []
        for part, reply in zip(_parts(windows, self.per_prompt), replies, strict=True):
            out += verdicts(reply.text, len(part)) or [None] * len(part)
        return out


class RuleJudge:
    """A rule that is applied to the windows' tokens where they stand in their text."""

    name = "the rule itself"

    def __init__(self, conditions: Conditions):
        self.conditions = conditions

    def judge(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """As `Judge` says: of a plain window, whether the rule holds anywhere in it; of a marked
        one, whether it holds on at least half of the marked tokens.
        """
        rule = rule_of(explanation)
        out: list[bool | None] = []
        for window in windows:
            holds = rule.holds(self.conditions, window.places)
            if window.marks:
                marked = [on for on, mark in zip(holds.tolist(), window.marks, strict=True) if mark]
                out.append(2 * sum(marked) >= len(marked))
            else:
                out.append(bool(holds.any()))
        return out


def rule_of(explanation: Explanation) -> Rule:
    """The rule that an explanation states."""
    detail = explanation.detail
    if not isinstance(detail, Mapping) or "rule" not in detail:
        raise InputError(
            f"the explanation {explanation.text[:60]!r} of {explanation.dictionary}"
            f"#{explanation.feature} is no rule: have a model judge it (--by URL --model NAME)"
        )
    return Rule.from_json(detail["rule"])


def _parts(windows: Sequence[Window], size: int) -> list[Sequence[Window]]:
    return [windows[i : i + size] for i in range(0, len(windows), size)]
