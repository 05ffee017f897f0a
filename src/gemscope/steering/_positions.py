"""Where edits act: which tokens, and how strongly at which step of generation."""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import Tokens

_WORDS = ("all", "prompt", "generated", "last")


@dataclass(frozen=True, slots=True)
class Positions:
    """Tokens that an edit acts at.

    `parts` are `all`, `prompt`, `generated`, `last` (the prompt's last token), or spans of the
    prompt such as `3:7`, `-2:` or `4` that count from BOS, which is 0, or from the prompt's end.
    Special tokens (BOS, a chat's turns) are left alone unless `special` says otherwise, or a span
    or `last` names them.
    """

    parts: tuple[str, ...] = ("all",)
    special: bool = False

    def __post_init__(self):
        for part in self.parts:
            if part not in _WORDS and not re.fullmatch(
                r"-?\d{1,9}|(-?\d{1,9})?:(-?\d{1,9})?", part
            ):
                raise InputError(
                    f"no positions {part!r}: write all, prompt, generated, last, or a span of the "
                    "prompt such as 3:7, several joined by +"
                )
        if not self.parts:
            raise InputError("no positions were given; write all, or some of the prompt's")

    @classmethod
    def parse(cls, text: str, *, special: bool = False) -> "Positions":
        """Such as `last+generated` or `3:7`."""
        return cls(tuple(part.strip() for part in text.split("+")), special)

    def __str__(self) -> str:
        return "+".join(self.parts)

    def mask(self, tokens: Tokens) -> Bool[Tensor, " n_tokens"]:
        """Which tokens are acted at; refuses spans that lie outside a row's prompt."""
        if self.parts == ("all",) and not self.special:
            return tokens.ordinary
        in_prompt = tokens.steps < 0
        allowed = torch.ones_like(in_prompt) if self.special else tokens.ordinary
        out = torch.zeros_like(in_prompt)
        for part in self.parts:
            match part:
                case "all":
                    out |= allowed
                case "prompt":
                    out |= allowed & in_prompt
                case "generated":
                    out |= allowed & ~in_prompt
                case "last":
                    out |= tokens.steps == -1
                case _:
                    out |= self._span(part, tokens)
        return out

    def _span(self, part: str, tokens: Tokens) -> Tensor:
        self.check(tokens.prompt_lengths)
        first, colon, stop = part.partition(":")
        lengths = tokens.prompt_lengths[tokens.rows]
        low = _place(first, lengths, torch.zeros_like(lengths))
        high = _place(stop, lengths, lengths) if colon else low + 1
        return (tokens.positions >= low) & (tokens.positions < high)

    def check(self, prompt_lengths: Tensor) -> None:
        """Refuse spans that hold nothing, or more than there is, of the shortest prompt."""
        shortest = int(prompt_lengths.min())
        for part in self.parts:
            if part in _WORDS:
                continue
            first, colon, stop = part.partition(":")
            low = int(first) if first else 0
            high = (int(stop) if stop else shortest) if colon else low + 1
            if not colon and low < 0:
                high = low + 1 or shortest
            places = [p + shortest if p < 0 else p for p in (low, high)]
            if not 0 <= places[0] < places[1] <= shortest:
                raise InputError(
                    f"positions {part} are not in a prompt of {shortest} tokens; give places from "
                    f"0, which is BOS, to {shortest - 1}"
                )


@dataclass(frozen=True, slots=True)
class Schedule:
    """How an edit fades in the generated tokens; in the prompt it is whole."""

    first: int | None = None
    """It acts at the first so many generated tokens only."""
    decay: float = 1.0
    """Share that is left from each generated token to the next."""

    def __post_init__(self):
        if self.first is not None and self.first < 0:
            raise InputError(f"the first {self.first} tokens: give 0 or more")
        if not 0 <= self.decay <= 1:
            raise InputError(f"a decay of {self.decay}: give a share between 0 and 1")

    def factors(self, tokens: Tokens) -> Float[Tensor, " n_tokens"] | float:
        """What the change at each token is multiplied by."""
        if self.first is None and self.decay == 1:
            return 1.0
        steps = tokens.steps
        out = torch.ones(len(steps), device=steps.device)
        if self.decay != 1:
            out = torch.as_tensor(self.decay, device=steps.device) ** steps.clamp_min(0)
        if self.first is not None:
            out = torch.where(steps < self.first, out, 0.0)
        return out.float()


def _place(text: str, lengths: Tensor, default: Tensor) -> Tensor:
    if not text:
        return default
    place = int(text)
    return lengths + place if place < 0 else torch.full_like(lengths, place)
