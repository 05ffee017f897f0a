"""What people and methods say of features."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from gemscope.errors import InputError

METHODS = ("rule", "model", "imported")
"""Where an explanation comes from."""


def now() -> str:
    """The time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well an explanation predicts when its feature fires, on documents not used for it."""

    name: str
    value: float
    """Balanced accuracy in [0, 1]; of a simulation the correlation."""
    low: float
    high: float
    """95% interval."""
    null: float | None = None
    """The same with the explanation of another feature."""
    n: int = 0
    """Examples judged."""
    failures: int = 0
    """Replies that could not be read: counted as wrong."""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a feature is said to fire on, by a method."""

    dictionary: str
    feature: int
    text: str
    method: str
    author: str
    scores: tuple[Score, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=now)

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"no method {self.method!r}; an explanation's is {', '.join(METHODS)}")

    @property
    def score(self) -> float | None:
        """The first of its scores."""
        return self.scores[0].value if self.scores else None

    @property
    def key(self) -> str:
        """What makes it the same explanation as another: everything but scores and time."""
        return _key(self.dictionary, self.feature, self.method, self.author, self.text)

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        return {
            "key": self.key, "dictionary": self.dictionary, "feature": self.feature,
            "text": self.text, "method": self.method, "author": self.author, "score": self.score,
            "scores": json.dumps([asdict(s) for s in self.scores]),
            "detail": json.dumps(dict(self.detail)), "created": self.created or now(),
        }  # fmt: skip

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Explanation":
        """From a row of the table."""
        names = ("dictionary", "feature", "text", "method", "author", "created")
        return cls(
            **{name: row[name] for name in names},
            scores=tuple(Score(**s) for s in json.loads(row["scores"])),
            detail=json.loads(row["detail"]),
        )

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self) | {"scores": [asdict(s) for s in self.scores], "score": self.score}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a person says of a feature; nothing automatic changes it."""

    dictionary: str
    feature: int
    text: str
    author: str = ""
    confidence: float | None = None
    limitations: tuple[str, ...] = ()
    created: str = field(default_factory=now)
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes it the same note as another: who says what of which feature."""
        said = json.dumps([self.confidence, list(self.limitations)])
        return _key(self.dictionary, self.feature, "note", self.author, f"{self.text}\0{said}")

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        return {
            "key": self.key, "dictionary": self.dictionary, "feature": self.feature,
            "text": self.text, "author": self.author, "confidence": self.confidence,
            "limitations": list(self.limitations), "detail": json.dumps(dict(self.detail)),
            "created": self.created or now(),
        }  # fmt: skip

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Note":
        """From a row of the table."""
        names = ("dictionary", "feature", "text", "author", "confidence", "created")
        return cls(
            **{name: row[name] for name in names},
            limitations=tuple(row["limitations"] or ()),
            detail=json.loads(row["detail"]),
        )

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self) | {"limitations": list(self.limitations)}


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
