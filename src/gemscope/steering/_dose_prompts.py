"""Prompts that lean towards no feature: what effects of steering are measured on by default."""

from gemscope import miniature
from gemscope.lm import LanguageModel

_PROSE = (
    "From my experience,", "The other day", "I have always thought that", "What people call",
    "On the way home,", "It turned out that", "Most of the time,", "The first thing to know is",
)  # fmt: skip
_PYTHON = (
    '"""Return the', "        self.", "# The", "    for item in", "    Note that", "try:\n    ",
    "    It is", "        if not",
)  # fmt: skip


def neutral_prompts(model: LanguageModel) -> tuple[str, ...]:
    """Eight beginnings that leave open what follows.

    Of prose, the first being that of 2505.20063; for the bundled miniature, which has read only
    Python's library, half of code and half of docstrings and comments.
    """
    return _PYTHON if model.name == miniature.MODEL_NAME else _PROSE
