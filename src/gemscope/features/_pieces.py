"""Tokens as text that can be read one by one."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

VISIBLE = {ord("\n"): "⏎", ord("\r"): "⏎", ord("\t"): "⇥"}


def token_pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token, which together are the text of all.

    A character whose bytes are spread over several tokens stands at the last of them, and the
    others are empty; only bytes that never become a character are shown as U+FFFD. Unknown ids
    are shown as `<id>`.
    """
    pieces: list[str] = []
    held: list[int] = []
    size = len(tokenizer)
    for token in map(int, ids):
        if not 0 <= token < size:
            pieces += [""] * len(held) + [f"<{token}>"]
            held = []
            continue
        held.append(token)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        # A character has four bytes at most, so more tokens than that are not one.
        if text.endswith("�") and len(held) < 4:
            continue
        pieces += [""] * (len(held) - 1) + [text]
        held = []
    if held:
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        pieces += [""] * (len(held) - 1) + [text]
    return pieces


class KnownPieces:
    """`token_pieces` of one tokenizer, for many texts: what a token is by itself is remembered."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._size = tokenizer, len(tokenizer)
        self._known: dict[int, str] = {}
        self._whole: dict[int, str] = {}
        """The same without tokens that are part of a character, or none at all."""

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, which together are the text of all."""
        try:
            return [self._whole[i] for i in ids]
        except KeyError:
            pieces = token_pieces(self, ids)
        for i in ids:
            if 0 <= i < self._size and not (text := self.decode([i])).endswith("�"):
                self._whole[i] = text
        return pieces

    def __len__(self) -> int:
        return self._size

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        """As the tokenizer has it."""
        if len(ids) != 1:
            return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found = self._known.get(ids[0])
        if found is None:
            found = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            self._known[ids[0]] = found
        return found


def vocabulary(tokenizer: Any) -> list[str]:
    """The text of every token by itself; a part of a character is shown as U+FFFD."""
    ids = range(len(tokenizer))
    return tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def bare(token: str) -> str:
    """A token without the space around it; one of white space alone as it is."""
    return token.strip() or token


def marked(token: str) -> str:
    """A token by itself, with the spaces in it marked: `·self`, and `·×8` for eight of them."""
    runs = re.sub(r" {4,}", lambda found: f"·×{len(found[0])}", token)
    return shown(runs.replace(" ", "·"))


def shown(piece: str) -> str:
    """A token with line breaks and tabs made visible."""
    return piece.translate(VISIBLE)
