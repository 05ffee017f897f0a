"""What is asked of a language model, and what it answers."""

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class Stopped(Exception):  # noqa: N818
    """A run was ended by a signal; what was answered is kept."""


class Halted(Exception):  # noqa: N818
    """A request was given up because the run ends; the user is told by whoever ended it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation to be continued."""

    messages: tuple[tuple[str, str], ...]
    """`(role, content)`; roles are system, user, assistant."""
    max_tokens: int
    temperature: float = 0.0
    purpose: str = ""
    """What for, to be read in the file of replies."""

    def key(self, at: str, model: str) -> str:
        """SHA-256 of everything the answer depends on, in hexadecimal."""
        parts = [at, model, self.messages, self.max_tokens, self.temperature]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came."""

    text: str
    finish: str = ""
    """Why it ended, as the server says: `stop`, `length`, ..."""
    tokens_in: int = 0
    tokens_out: int = 0
    created: str = ""
    """ISO 8601, UTC."""


@runtime_checkable
class Chat(Protocol):
    """A language model that continues conversations."""

    model: str
    at: str
    """Where it is: a base URL, or which weights in this process."""
    concurrency: int
    """Requests it takes at a time, at most."""

    def answer(self, request: Request) -> Reply:
        """Continue a conversation; InputError where it cannot, Halted after `halt`."""
        ...

    def halt(self) -> None:
        """End what is under way, from another thread."""
        ...
