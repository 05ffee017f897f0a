"""The prompts of an intervention, and which of their tokens it is about."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.errors import InputError
from gemscope.features import marked, token_pieces
from gemscope.lm import LanguageModel


@dataclass(frozen=True, eq=False)
class Prompt:
    """One text as the model is given it: BOS, then its tokens."""

    text: str
    batch: TokenBatch
    tokenizer: Any

    @classmethod
    def of(cls, model: LanguageModel, text: str) -> "Prompt":
        """`text` as one context of `model`."""
        return cls(text, model.tokens(text), model.tokenizer)

    def __len__(self) -> int:
        return self.batch.ids.shape[1]

    @property
    def ids(self) -> list[int]:
        """Its tokens, BOS included."""
        return self.batch.ids[0].tolist()

    @property
    def ordinary(self) -> Bool[Tensor, " seq"]:
        """False at BOS and other special tokens."""
        return self.batch.counts[0]

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each token, which together are the text of all."""
        return token_pieces(self.tokenizer, self.ids)

    def shown(self, place: int) -> str:
        """A token with spaces and line breaks made visible; `""` where only a later one completes
        the character.
        """
        return marked(self.pieces[place])

    def rows(self, count: int) -> TokenBatch:
        """The prompt in `count` rows."""
        b = self.batch
        return TokenBatch(
            b.ids.expand(count, -1).contiguous(), b.counts.expand(count, -1).contiguous(),
            b.documents.expand(count).contiguous(), b.starts.expand(count).contiguous(),
        )  # fmt: skip

    def check(self, place: int, what: str) -> int:
        """`place` counted from the start; a negative one counts from the end."""
        found = place + len(self) if place < 0 else place
        if not 0 <= found < len(self):
            raise InputError(
                f"{what} {place} is outside the prompt, whose {len(self)} tokens are at 0 (BOS) to "
                f"{len(self) - 1}: {self.listed}"
            )
        return found

    @property
    def listed(self) -> str:
        """Its tokens in one line."""
        return "|".join(self.shown(i) for i in range(len(self)))


@dataclass(frozen=True, slots=True)
class Places:
    """Tokens of a prompt: all ordinary ones, or some by number."""

    numbers: tuple[int, ...] | None = None
    """Counted from BOS, which is 0; negative ones from the end, -1 being the last token."""

    @classmethod
    def parse(cls, text: str) -> "Places":
        """`all`, `last`, or numbers and ranges such as `3`, `-2`, `3:7` (without 7), `2,5,8`."""
        if text == "all":
            return cls()
        numbers: list[int] = []
        for part in text.split(","):
            span = re.fullmatch(r"(\d{1,7}):(\d{1,7})", part)
            if span is not None and int(span[1]) < int(span[2]) <= int(span[1]) + 2**20:
                numbers += range(int(span[1]), int(span[2]))
            elif part == "last":
                numbers.append(-1)
            elif re.fullmatch(r"-?\d{1,7}", part):
                numbers.append(int(part))
            else:
                raise InputError(
                    f"{text!r} names no positions: write all, last, a number (0 is BOS, -1 the "
                    "last token), a range such as 3:7, which is 3 to 6, or several with commas"
                )
        return cls(tuple(dict.fromkeys(numbers)))

    def __str__(self) -> str:
        return "all" if self.numbers is None else ",".join(map(str, self.numbers))

    def among(self, prompt: Prompt) -> list[int]:
        """The positions in `prompt`, each once."""
        if self.numbers is None:
            return prompt.ordinary.nonzero()[:, 0].tolist()
        return list(dict.fromkeys(prompt.check(n, "position") for n in self.numbers))


def same_length(clean: Prompt, corrupted: Prompt, why: str, way_out: str) -> None:
    """Refuse prompts whose tokens do not stand opposite each other."""
    if len(clean) != len(corrupted):
        raise InputError(
            f"the prompts have {len(clean)} and {len(corrupted)} tokens, and {why}: {clean.listed} "
            f"and {corrupted.listed}; {way_out}"
        )


def aligned(places: Places, clean: Prompt, corrupted: Prompt) -> Int[Tensor, " seq"]:
    """For each position of `clean` the one of `corrupted` that stands opposite, 0 where none is
    asked for.

    Positions are the same numbers in both; those counted from the end are counted from each end.
    """
    out = torch.zeros(len(clean), dtype=torch.int64)
    if places.numbers is None:
        same_length(
            clean, corrupted, "patching takes values position by position",
            "make them equally long, or name positions that both have with --positions",
        )  # fmt: skip
        return torch.arange(len(clean))
    for number in places.numbers:
        out[clean.check(number, "position")] = _opposite(number, clean, corrupted)
    return out


def _opposite(number: int, clean: Prompt, corrupted: Prompt) -> int:
    found = number + len(corrupted) if number < 0 else number
    if not 0 <= found < len(corrupted):
        raise InputError(
            f"position {number} is not in both prompts, which have {len(clean)} and "
            f"{len(corrupted)} tokens: {clean.listed} and {corrupted.listed}"
        )
    return found


def masks(rows: Sequence[Sequence[int]], length: int) -> Bool[Tensor, "rows seq"]:
    """For each row which positions are meant."""
    out = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in enumerate(rows):
        out[row, list(places)] = True
    return out
