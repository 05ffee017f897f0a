"""Several catalogs as one: a human's word wins, two are both kept, nothing goes without a word."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.errors import InputError
from gemscope.features import Explanation, Note

from ._catalog import FORMAT, OWN, VERSION, Catalog, incoming, read_catalog
from ._catalog_out import with_labels
from ._files import check_target, dump, finite, new_file
from ._labels import Label, best_explanation, human_word, same_note

Key = tuple[str, int, int]
"""Dictionary, layer and feature."""
_CLOSE = 1e-6
_BOTH = "two human interpretations, both kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Where catalogs do not agree, and what was done."""

    dictionary: str
    layer: int
    feature: int
    what: str
    kept: str
    other: str
    source: str
    """The file that `other` is from."""

    def __str__(self) -> str:
        where = f"{self.dictionary or 'layer ' + str(self.layer)}, feature {self.feature}"
        return f"{where}: {self.what}; kept {self.kept!r}, {self.source} says {self.other!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What merging gave."""

    features: int
    conflicts: list[Conflict]
    assumed: list[str]
    """Files that name no dictionary, and which they were taken to be of."""


@dataclass(slots=True)
class _Feature:
    """One feature as merged so far."""

    key: Key
    entry: dict[str, Any] = field(default_factory=dict)
    explanations: list[Explanation] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def merge_catalogs(files: Sequence[Path], target: Path, *, force: bool = False) -> Merged:
    """Merge catalogs into `target`, features in the order in which they first come.

    Losing texts are not dropped: they stay in the feature's `explanations` and `notes`, and every
    conflict is listed in the file's head as it is in the answer.
    """
    if len(files) < 2:
        raise InputError("give two or more catalogs to merge")
    check_target(target, force=force)
    catalogs = [read_catalog(file).checked() for file in files]
    assumed = _assumed(catalogs)
    features: dict[Key, _Feature] = {}
    conflicts: list[Conflict] = []
    for catalog in catalogs:
        guess = assumed.get(str(catalog.file), {})
        for entry, label in zip(
            catalog.entries, incoming(catalog, catalog.file.name).labels, strict=True
        ):
            layer = int(entry["layer"])
            name = label.dictionary or guess.get(layer, "")
            key = (name, layer, label.feature)
            feature = features.setdefault(key, _Feature(key))
            _Step(feature, catalog.file.name, conflicts).take(entry, label)
    entries = [_written(feature) for feature in features.values()]
    _write(target, catalogs, entries, conflicts, force)
    told = [
        f"{file} names no dictionary: taken to be of {', '.join(sorted(set(guess.values())))}"
        for file, guess in assumed.items()
    ]
    return Merged(features=len(entries), conflicts=conflicts, assumed=told)


def _assumed(catalogs: Sequence[Catalog]) -> dict[str, dict[int, str]]:
    """By file that names no dictionary: the one that the others name, by layer."""
    named: dict[int, set[str]] = {}
    for catalog in catalogs:
        for entry in catalog.entries:
            if name := catalog.name(entry):
                named.setdefault(int(entry["layer"]), set()).add(name)
    found: dict[str, dict[int, str]] = {}
    for catalog in catalogs:
        layers = {int(e["layer"]) for e in catalog.entries if not catalog.name(e)}
        for layer in sorted(layers & named.keys()):
            if len(named[layer]) > 1:
                raise InputError(
                    f"{catalog.file} does not say of which dictionary of layer {layer} it is: "
                    f'{", ".join(sorted(named[layer])[:4])}; add "dictionary" to it'
                )
            found.setdefault(str(catalog.file), {})[layer] = next(iter(named[layer]))
    return found


@dataclass(slots=True)
class _Step:
    """One entry of one file, going into a feature."""

    feature: _Feature
    source: str
    conflicts: list[Conflict]

    def take(self, entry: dict[str, Any], label: Label) -> None:
        """Add an entry and its labels."""
        self._labels(label)
        mine = self.feature.entry
        self._pattern(mine.setdefault("activation_pattern", {}), entry.get("activation_pattern"))
        related = mine.setdefault("related_features", [])
        related += [r for r in entry.get("related_features") or [] if r not in related]
        for key, value in entry.items():
            if key not in OWN and mine.setdefault(key, value) != value:
                self._conflict(f"{key} differs", dump(mine[key]), dump(value))

    def _labels(self, label: Label) -> None:
        """Add what is said; tell where this file's description or the one before is not kept."""
        before, told = self._description(), len(self.conflicts)
        for note, unsigned in label.notes_and_unsigned:
            self._note(note, unsigned)
        for explanation, unsigned in label.explanations_and_unsigned:
            self._explanation(explanation, unsigned)
        if any(c.what == _BOTH for c in self.conflicts[told:]):
            return
        after = self._description()
        human = bool(human_word(self.feature.notes).strip())
        what = "a human's word wins over a description" if human else "descriptions differ"
        new = _description(
            [e for e, _ in label.explanations_and_unsigned],
            [n for n, _ in label.notes_and_unsigned],
        )
        for other in dict.fromkeys((before, new)):
            if other.strip() and other != after:
                self._conflict(what, after, other)

    def _description(self) -> str:
        return _description(self.feature.explanations, self.feature.notes)

    def _note(self, note: Note, unsigned: bool) -> None:
        notes = self.feature.notes
        if any(same_note(note, n) and (unsigned or note.author == n.author) for n in notes):
            return
        if notes:
            kept = "; ".join(f"{n.author or 'unknown'}: {n.text}" for n in notes)
            self._conflict(_BOTH, kept, note.text)
        notes.append(note)

    def _explanation(self, new: Explanation, unsigned: bool) -> None:
        for place, old in enumerate(self.feature.explanations):
            if old.text != new.text:
                continue
            if (old.method, old.author) == (new.method, new.author):
                if new.scores and not old.scores:
                    self.feature.explanations[place] = new
                elif new.scores and new.scores != old.scores:
                    self._conflict("scores differ", str(old.score), str(new.score))
                return
            if unsigned:
                return
        self.feature.explanations.append(new)

    def _pattern(self, mine: dict[str, Any], new: dict[str, Any] | None) -> None:
        for key, value in (new or {}).items():
            if value is None:
                continue
            old = mine.setdefault(key, value)
            if key == "typical_contexts":
                mine[key] = list(dict.fromkeys([*old, *value]))
            elif key == "max_activation":
                mine[key] = max(old, value)
            elif old != value and not _close(old, value):
                self._conflict(f"{key} differs", dump(old), dump(value))

    def _conflict(self, what: str, kept: str, other: str) -> None:
        name, layer, feature = self.feature.key
        self.conflicts.append(
            Conflict(
                dictionary=name,
                layer=layer,
                feature=feature,
                what=what,
                kept=kept,
                other=other,
                source=self.source,
            )
        )


def _description(explanations: Sequence[Explanation], notes: Sequence[Note]) -> str:
    best, word = best_explanation(explanations), human_word(notes)
    return word if word.strip() else "" if best is None else best.text


def _close(a: object, b: object) -> bool:
    both = isinstance(a, int | float) and isinstance(b, int | float)
    return both and abs(a - b) <= _CLOSE * max(abs(a), abs(b))  # type: ignore[operator, arg-type]


def _written(feature: _Feature) -> dict[str, Any]:
    name, layer, number = feature.key
    pattern = feature.entry["activation_pattern"]
    whole = {"threshold": None, "max_activation": None, "typical_contexts": []} | pattern
    measured = {
        "dictionary": name,
        "layer": layer,
        "feature_index": number,
        "activation_pattern": whole,
        "related_features": feature.entry["related_features"],
    }
    entry = with_labels(measured, feature.explanations, feature.notes)
    return finite(entry | {k: v for k, v in feature.entry.items() if k not in entry})


def _write(
    target: Path,
    catalogs: Sequence[Catalog],
    entries: list[dict[str, Any]],
    conflicts: list[Conflict],
    force: bool,
) -> None:
    heads: dict[str, dict[str, Any]] = {}
    for catalog in catalogs:
        listed = catalog.head.get("dictionaries")
        for one in listed if isinstance(listed, list) else []:
            if isinstance(one, dict):
                heads.setdefault(str(one.get("address")), one)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "gemscope": __version__,
        "merged_from": [catalog.file.name for catalog in catalogs],
        "conflicts": [asdict(conflict) for conflict in conflicts],
        "dictionaries": list(heads.values()),
    }
    with new_file(target, force=force) as stream:
        stream.write((dump(finite(head), indent=1)[:-2] + ',\n "features": [').encode())
        for number, entry in enumerate(entries):
            stream.write(((",\n  " if number else "\n  ") + dump(entry)).encode())
        stream.write(b"\n ]\n}\n")
