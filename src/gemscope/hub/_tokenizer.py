"""Tokenizers, and how several threads of a server may load parts of `transformers`."""

from threading import RLock
from typing import Any

IMPORTING = RLock()
"""`transformers` imports its parts when they are first asked for; of two threads at once one may
meet half a part and fail. Whoever asks for a part first holds this."""


def load_tokenizer(source: str) -> Any:
    """The tokenizer in the folder of a model."""
    with IMPORTING:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)
