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
