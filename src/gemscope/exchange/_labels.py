"""What files say of features, in the store's terms, and how labels are written as plain data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemscope.features import Explanation, Note, Score

from ._files import clean, map_text

MOST_FEATURES = 2**31
"""Above any dictionary's width: an index beyond it is a mistake wherever it goes."""
Index = Annotated[int, Field(ge=0, lt=MOST_FEATURES)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Method = Literal["rule", "model", "imported"]
Labelled = TypeVar("Labelled", Explanation, Note)
Confidence = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file."""

    place: str
    """Line, and index and key: `features[3].layer`, `line 12, index`."""
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}" if self.place else self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a file says of one feature."""

    dictionary: str
    """As the file names it; empty where it does not."""
    feature: int
    layer: int | None = None
    """The layer it is read in, where the file says so."""
    place: str = ""
    explanations: tuple[Explanation, ...] = ()
    notes: tuple[Note, ...] = ()
    within_layer: bool = False
    """`feature` counts from the first of its layer: elsewhere the layers of a multi-layer
    dictionary are dictionaries of their own."""
    unsigned: tuple[Explanation | Note, ...] = ()
    """Labels for which the file names no author: where the same is said already, they are it."""

    @property
    def explanations_and_unsigned(self) -> list[tuple[Explanation, bool]]:
        """All explanations, and whether each is without an author."""
        more = [(e, True) for e in self.unsigned if isinstance(e, Explanation)]
        return [*((e, False) for e in self.explanations), *more]

    @property
    def notes_and_unsigned(self) -> list[tuple[Note, bool]]:
        """All notes, and whether each is without an author."""
        more = [(n, True) for n in self.unsigned if isinstance(n, Note)]
        return [*((n, False) for n in self.notes), *more]


@dataclass(slots=True, kw_only=True)
class Incoming:
    """What a file brings."""

    format: str
    labels: list[Label] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What the file holds and an import of labels does not take."""
    densities: dict[str, list[tuple[Label, float]]] = field(default_factory=dict)
    """Densities that the file states, by dictionary, each with the feature it is of."""

    @property
    def named(self) -> list[str]:
        """The dictionaries the file names, each once."""
        return list(dict.fromkeys([*(label.dictionary for label in self.labels), *self.densities]))


class Plain(BaseModel):
    """Numbers are numbers and text is text: nothing is converted on the way."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class PlainScore(Plain):
    """A score as written."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    n: int = 0
    failures: int = 0
    detail: dict[str, Any] = {}


class PlainExplanation(Plain):
    """An explanation as written, beside the feature it is of."""

    text: str
    method: Method
    author: str = ""
    created: str = ""
    scores: list[PlainScore] = []
    detail: dict[str, Any] = {}


class PlainNote(Plain):
    """A note as written, beside the feature it is of."""

    text: str
    author: str = ""
    confidence: Confidence | None = None
    limitations: list[str] = []
    created: str = ""
    detail: dict[str, Any] = {}


def plain_explanation(explanation: Explanation) -> dict[str, Any]:
    """Everything of an explanation but what it is of, ready for JSON."""
    return {
        "text": explanation.text,
        "method": explanation.method,
        "author": explanation.author,
        "created": explanation.created,
        "scores": [{f.name: getattr(s, f.name) for f in fields(s)} for s in explanation.scores],
        "detail": dict(explanation.detail),
    }


def plain_note(note: Note) -> dict[str, Any]:
    """Everything of a note but what it is of, ready for JSON."""
    return {
        "text": note.text,
        "author": note.author,
        "confidence": note.confidence,
        "limitations": list(note.limitations),
        "created": note.created,
        "detail": dict(note.detail),
    }


def explanation_of(plain: PlainExplanation, dictionary: str, feature: int) -> Explanation:
    """The explanation that `plain_explanation` wrote."""
    scores = [
        Score(**{f.name: _number(f.name, getattr(s, f.name)) for f in fields(Score)})
        for s in plain.scores
    ]
    return cleaned(
        Explanation(
            dictionary=dictionary,
            feature=feature,
            text=plain.text,
            method=plain.method,
            author=plain.author,
            scores=tuple(scores),
            detail=plain.detail,
            created=plain.created,
        )
    )


def _number(name: str, value: Any) -> Any:
    # JSON has no NaN: what could not be measured was written as null.
    return float("nan") if value is None and name in ("value", "low", "high") else value


def note_of(plain: PlainNote, dictionary: str, feature: int) -> Note:
    """The note that `plain_note` wrote."""
    return cleaned(
        Note(
            dictionary=dictionary,
            feature=feature,
            text=plain.text,
            author=plain.author,
            confidence=plain.confidence,
            limitations=tuple(plain.limitations),
            created=plain.created,
            detail=plain.detail,
        )
    )


def cleaned(label: Labelled) -> Labelled:
    """`label` with no control character in any text of it."""
    change: dict[str, Any] = {
        "text": clean(label.text),
        "author": clean(label.author),
        "created": clean(label.created),
        "detail": map_text(label.detail, clean),
    }
    if isinstance(label, Note):
        change["limitations"] = tuple(clean(one) for one in label.limitations)
    return replace(label, **change)


def problems_of(error: ValidationError, place: str) -> Iterator[Problem]:
    """What pydantic found wrong, at `place` and the keys below it."""
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        yield Problem(path(place, one["loc"]), one["msg"][:1].lower() + one["msg"][1:])


def path(place: str, keys: Sequence[str | int]) -> str:
    """`place` with keys below it: `features[3]`, `related_features`, 0 gives
    `features[3].related_features[0]`.
    """
    for key in keys:
        if isinstance(key, int):
            place = f"{place}[{key}]"
        else:
            # pydantic names the member of a union that failed; that is no key of the file.
            place = f"{place}.{clean(key)[:80]}" if place else clean(key)[:80]
    return place


def best_explanation(explanations: Sequence[Explanation]) -> Explanation | None:
    """The one with the highest held-out score; without scores an imported one, then a model's."""
    order = {"imported": 2, "model": 1}
    return max(
        explanations,
        key=lambda e: (e.score is not None, e.score or 0.0, order.get(e.method, 0), e.created),
        default=None,
    )


def joined(notes: Sequence[Note]) -> Note | None:
    """Notes as the one that a manual interpretation holds: every text with its author, the lowest
    confidence given, all limitations.
    """
    if len(notes) < 2:
        return notes[0] if notes else None
    confidences = [n.confidence for n in notes if n.confidence is not None]
    return replace(
        notes[0],
        text="\n\n".join(f"{n.author or 'unknown'}: {n.text}" for n in notes),
        author=", ".join(dict.fromkeys(n.author or "unknown" for n in notes)),
        confidence=min(confidences, default=None),
        limitations=tuple(dict.fromkeys(limit for n in notes for limit in n.limitations)),
        created=max(n.created for n in notes),
        detail={},
    )


def same_note(note: Note, other: Note | None) -> bool:
    """Whether two notes say the same, whoever wrote them."""
    return other is not None and (note.text, note.confidence, note.limitations) == (
        other.text,
        other.confidence,
        other.limitations,
    )


def human_word(notes: Sequence[Note]) -> str:
    """What the newest note calls the feature; empty if there is none."""
    note = last_note(notes)
    return "" if note is None else str(note.detail.get("description") or note.text)


def last_note(notes: Sequence[Note]) -> Note | None:
    """The newest; of those of one moment, the last in the store."""
    return max(reversed(notes), key=lambda n: n.created, default=None)
