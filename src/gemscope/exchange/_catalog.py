"""The JSON catalog: its form, checked key by key, and the labels in it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from gemscope.errors import InputError
from gemscope.features import Explanation, Note

from ._files import clean, map_text, read_json
from ._labels import (
    Confidence,
    Incoming,
    Index,
    Label,
    Layer,
    Plain,
    PlainExplanation,
    PlainNote,
    Problem,
    cleaned,
    explanation_of,
    joined,
    note_of,
    path,
    problems_of,
    same_note,
)

FORMAT = "gemscope-catalog"
VERSION = 1
RELATIONSHIPS = {
    "higher-abstraction": "the other is the more general: it fires where this one does, and beyond",
    "sub-concept": "the other is the more special: it fires only where this one does",
    "duplicate": "both fire on the same tokens and write the same direction",
    "opposite": "their directions are opposed",
    "similar direction": "their directions are alike",
    "fires together": "they fire on the same tokens more than by chance",
}
"""What `related_features` that gemscope writes mean; others are read and kept."""
OWN = frozenset({
    "dictionary", "layer", "feature_index", "description", "activation_pattern",
    "related_features", "manual_interpretation", "explanations", "notes",
})  # fmt: skip
"""Keys of a feature that have a meaning here; others are carried along."""
_MEASURED = {"activation_pattern", "related_features", "explanations", "notes"}


class Pattern(Plain):
    """`activation_pattern`."""

    threshold: float | None = None
    max_activation: float | None = None
    typical_contexts: list[str] | None = None


class Related(Plain):
    """One of `related_features`."""

    layer: Layer
    index: Index
    relationship: Annotated[str, Field(min_length=1)]


class Interpretation(Plain):
    """`manual_interpretation`: a confidence is a share, or a word such as `high`."""

    confidence: Confidence | str | None = None
    notes: str | None = None
    known_limitations: list[str] | str | None = None
    author: str | None = None


class Entry(Plain):
    """One feature of a catalog."""

    layer: Layer
    feature_index: Index
    dictionary: str | None = None
    description: str | None = None
    activation_pattern: Pattern | None = None
    related_features: list[Related] | None = None
    manual_interpretation: Interpretation | None = None

    @property
    def signed(self) -> bool:
        """Whether its interpretation names its author."""
        return self.manual_interpretation is not None and bool(self.manual_interpretation.author)


class OwnEntry(Entry):
    """One feature of a catalog that gemscope wrote: every label of it, in full."""

    explanations: list[PlainExplanation] | None = None
    notes: list[PlainNote] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """A catalog file: its entries as they are in it."""

    file: Path
    head: dict[str, Any]
    """What stands beside the entries; empty of a plain list."""
    entries: list[Any]
    """Objects, as soon as there are no problems."""
    bare: bool
    """A plain list, without a head."""
    problems: list[Problem]

    @property
    def ours(self) -> bool:
        """Whether gemscope wrote it."""
        return self.head.get("format") == FORMAT

    @property
    def model(self) -> type["Entry"]:
        """What an entry must be."""
        return OwnEntry if self.ours else Entry

    def checked(self) -> "Catalog":
        """This catalog; InputError if anything is wrong with it."""
        refuse(self.file, self.problems)
        return self

    def place(self, number: int) -> str:
        """Where an entry is in the file."""
        return f"[{number}]" if self.bare else f"features[{number}]"

    def name(self, entry: dict[str, Any]) -> str:
        """The dictionary of an entry, as the file names it; empty if it does not."""
        one = self.head.get("dictionary")
        named = entry.get("dictionary") or (one.get("address") if isinstance(one, dict) else one)
        return named if isinstance(named, str) else ""


def refuse(file: Path, problems: list[Problem]) -> None:
    """Say the first of some problems and where the others are listed."""
    if problems:
        more = f" and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise InputError(
            f"{file} has a problem at {problems[0]}{more}; nothing was read, "
            f"gemscope catalog validate {file} lists all"
        )


def read_catalog(file: Path) -> Catalog:
    """Read a catalog and check all of it; what is wrong is in `problems`."""
    return catalog_of(file, read_json(file))


def catalog_of(file: Path, value: Any) -> Catalog:
    """The catalog that a JSON value is."""
    bare = isinstance(value, list)
    entries = value if bare else value.get("features") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise InputError(
            f"{file} is no catalog: a list of features is expected, or an object with "
            '"features", a list'
        )
    head = {} if bare else {k: v for k, v in value.items() if k != "features"}
    if head.get("format") == FORMAT and head.get("version") != VERSION:
        raise InputError(
            f"{file} has version {str(head.get('version'))[:20]} of the catalog and this gemscope "
            f"reads {VERSION}; update gemscope"
        )
    catalog = Catalog(file=file, head=head, entries=entries, bare=bare, problems=[])
    catalog.problems.extend(_problems(catalog))
    return catalog


def _problems(catalog: Catalog) -> Iterator[Problem]:
    seen: dict[tuple[str, int, int], str] = {}
    for number, entry in enumerate(catalog.entries):
        place = catalog.place(number)
        if not isinstance(entry, dict):
            yield Problem(place, "a feature is an object")
            continue
        try:
            read = catalog.model.model_validate(entry)
        except ValidationError as error:
            yield from problems_of(error, place)
            continue
        key = (catalog.name(entry), read.layer, read.feature_index)
        if key in seen:
            yield Problem(
                path(place, ["feature_index"]),
                f"layer {key[1]} feature {key[2]} is there twice, first as {seen[key]}",
            )
        seen.setdefault(key, place)


def incoming(catalog: Catalog, author: str) -> Incoming:
    """The labels of a catalog; `author` is theirs where the file names none."""
    catalog.checked()
    author = str(catalog.head.get("author") or author)
    labels = [
        _label(entry, catalog, catalog.place(number), author)
        for number, entry in enumerate(catalog.entries)
    ]
    return Incoming(format="catalog", labels=labels)


def _label(entry: dict[str, Any], catalog: Catalog, place: str, author: str) -> Label:
    read = catalog.model.model_validate(entry)
    dictionary, feature = catalog.name(entry), read.feature_index
    listed, noted = [], []
    if isinstance(read, OwnEntry):
        listed = [explanation_of(e, dictionary, feature) for e in read.explanations or []]
        noted = [note_of(n, dictionary, feature) for n in read.notes or []]
    description = clean(read.description or "")
    note = _note(read.manual_interpretation, dictionary, feature, author)
    whole = joined(noted)
    told = {n.text for n in noted} | {e.text for e in listed}
    told |= {str(n.detail.get("description")) for n in noted}
    if note is not None:
        told.add(note.text)
        if description and description not in told:
            # What its author calls the feature, where the notes say something else.
            note = replace(note, detail={**note.detail, "description": description})
    extra = _extra(entry, catalog.ours)
    if note is not None and any(same_note(note, n) for n in [*noted, *filter(None, [whole])]):
        note = None
    made: list[Explanation | Note] = []
    if description.strip() and description not in told:
        made.append(
            Explanation(
                dictionary=dictionary,
                feature=feature,
                text=description,
                method="imported",
                author=clean(author),
                detail={"catalog": extra} if extra else {},
                created="",
            )
        )
    elif note is not None and extra:
        note = replace(note, detail={**note.detail, "catalog": extra})
    if note is not None:
        made.append(note)
    signed = "author" in catalog.head
    own = [m for m in made if signed or (m is note and read.signed)]
    return Label(
        dictionary=dictionary,
        feature=feature,
        layer=read.layer,
        place=place,
        explanations=(*listed, *(m for m in own if isinstance(m, Explanation))),
        notes=(*noted, *(m for m in own if isinstance(m, Note))),
        unsigned=tuple(m for m in made if m not in own),
    )


def _note(read: Interpretation | None, dictionary: str, feature: int, author: str) -> Note | None:
    """A manual interpretation as a note; None where it says nothing."""
    if read is None:
        return None
    limits = read.known_limitations
    limitations = [limits] if isinstance(limits, str) and limits.strip() else limits or []
    carried: dict[str, Any] = dict(read.model_extra or {})
    if isinstance(read.confidence, str):
        carried["confidence"] = read.confidence
    if isinstance(limits, str):
        carried["known_limitations"] = limits
    if not (read.notes or "").strip() and read.confidence is None and not limitations:
        return None
    share = None if isinstance(read.confidence, str) else read.confidence
    return cleaned(
        Note(
            dictionary=dictionary,
            feature=feature,
            text=read.notes or "",
            author=read.author or author,
            confidence=None if share is None else float(share),
            limitations=tuple(limitations),
            created="",
            detail={"interpretation": carried} if carried else {},
        )
    )


def _extra(entry: dict[str, Any], ours: bool) -> dict[str, Any]:
    """What an entry holds beside labels, to be given back when it is exported.

    Of a file of ours only keys that are not ours: its statistics came from a store.
    """
    known = (
        OWN if ours else OWN - {"activation_pattern", "related_features", "explanations", "notes"}
    )
    kept = {k: v for k, v in entry.items() if k not in known and v not in (None, [], {})}
    return map_text(kept, clean)
