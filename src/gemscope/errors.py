"""A user's mistake, and how it is told."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what is accepted, and what to do next. The
    command line prints it and exits with code 2; a library user may catch it as `ValueError`.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names in `known` that look most like `name`, best first."""
    # A cutoff would leave a badly misspelt name without any help.
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.0)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known names."""
    return f"nearest: {', '.join(nearest(name, known))}"
