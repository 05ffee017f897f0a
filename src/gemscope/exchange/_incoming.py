"""Labels of a file into a store: every one checked before any is written, none written over."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from gemscope.errors import InputError
from gemscope.features import Explanation, Note, Store

from ._compare import Comparison, compare
from ._kept import Measurement, keep
from ._labels import Incoming, Label, joined, same_note
from ._neuronpedia import address_of

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import did."""

    format: str
    dictionaries: list[str]
    explanations: int
    """New ones."""
    notes: int
    """New ones."""
    already: int
    """Labels that the store had."""
    skipped: int
    """Labels of features that the store does not have."""
    empty: int
    """Features of the file without a label."""
    kept: dict[str, int] = field(default_factory=dict)
    """Rows of others' statistics (`features`) and examples (`activations`) kept."""
    lost: list[str] = field(default_factory=list)
    compared: list[Comparison] = field(default_factory=list)
    """Densities in the file against those of the store."""

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


@dataclass(slots=True)
class _Dictionary:
    """A dictionary of the store, as labels are matched with it."""

    address: str
    facts: dict[str, Any]
    layers: list[int]

    def feature(self, label: Label) -> int | None:
        """The feature a label is of; None if it is none of this dictionary's."""
        feature = label.feature
        several = len(set(self.layers)) > 1
        if label.layer is not None and label.within_layer and several:
            if label.layer not in self.layers:
                return None
            feature += self.layers.index(label.layer)
        if feature >= len(self.layers):
            return None
        fits = label.layer is None or self.layers[feature] == label.layer
        return feature if fits else None


def bring_in(
    store: Store,
    incoming: Incoming,
    path: Path,
    *,
    addresses: Sequence[str] = (),
    skip_unknown: bool = False,
    measurements: Callable[[], Iterator[Measurement]] | None = None,
) -> Imported:
    """Add the labels of `incoming` to `store`.

    `addresses` are the dictionaries the file is of, where it does not say, or says it otherwise:
    of several, a feature is of the one that is read in its layer. What the store has stays as it
    is, so that importing twice changes nothing; a label it has gets scores if it had none.
    """
    known = _dictionaries(store, incoming, path, addresses)
    explanations: list[tuple[Explanation, bool]] = []
    notes: list[tuple[Note, bool]] = []
    skipped = 0
    unknown = _unknown(incoming.labels, measurements, known)
    if unknown and not skip_unknown:
        raise InputError(_refusal(path, unknown, known))
    for label in incoming.labels:
        one, feature = _place(label, known)
        if one is None or feature is None:
            skipped += len(label.explanations) + len(label.notes) + len(label.unsigned)
            continue
        to: dict[str, Any] = {"dictionary": one.address, "feature": feature}
        explanations += [(replace(e, **to), un) for e, un in label.explanations_and_unsigned]
        notes += [(replace(n, **to), un) for n, un in label.notes_and_unsigned]
    used = list(dict.fromkeys(one.address for options in known.values() for one in options))
    had: dict[tuple[str, int], list[Note]] = {}
    for note in (note for address in used for note in store.notes(address)):
        had.setdefault((note.dictionary, note.feature), []).append(note)
    new_explanations = _new_explanations(store, used, explanations, had)
    new_notes = _new_notes(notes, had)
    store.add_explanations(new_explanations)
    store.add_notes(new_notes)
    kept: dict[str, int] = {}
    if measurements is not None:
        origin = f"{incoming.format} {', '.join(incoming.named)}"
        kept = keep(store, _placed(measurements(), known), origin)
    total = len(explanations) + len(notes)
    return Imported(
        format=incoming.format,
        dictionaries=used,
        explanations=len(new_explanations),
        notes=len(new_notes),
        already=total - len(new_explanations) - len(new_notes),
        skipped=skipped,
        empty=sum(not (one.explanations or one.notes or one.unsigned) for one in incoming.labels),
        kept=kept,
        lost=list(incoming.lost),
        compared=_compared(store, incoming, known),
    )


def _dictionaries(
    store: Store, incoming: Incoming, path: Path, addresses: Sequence[str]
) -> dict[str, list[_Dictionary]]:
    """By name in the file, the dictionaries of the store that it may be."""
    given = [_open(store, address) for address in dict.fromkeys(addresses)]
    names = incoming.named
    if given:
        if len(names) > 1 and len(given) == 1:
            raise InputError(
                f"{path} is of {len(names)} dictionaries ({', '.join(names[:3])}) and --as names "
                "one; repeat --as for each layer, or leave it out"
            )
        return dict.fromkeys(names, given)
    rows = store.dictionaries()
    by_name: dict[str, list[_Dictionary]] = {}
    for name in names:
        if not name:
            raise InputError(
                f"{path} does not say which dictionary it is of; give --as ADDRESS, one of "
                f"{', '.join(str(r['address']) for r in rows[:4])}"
            )
        address = name if any(r["address"] == name for r in rows) else _published(store, name, rows)
        if not address:
            raise InputError(
                f"{path} is of {name}, which {store.folder} does not hold: index it first "
                f"(gemscope index ADDRESS --to {store.folder}), or say with --as ADDRESS which of "
                "its dictionaries is meant"
            )
        by_name[name] = [_open(store, address)]
    return by_name


def _published(store: Store, name: str, rows: list[dict[str, Any]]) -> str:
    if "/" not in name:
        return ""
    layers = {
        layer: None
        for row in rows
        for layer in store.features(row["address"], ["layer"])["layer"].unique().to_pylist()
    }
    return address_of(name, rows, list(layers))


def _open(store: Store, address: str) -> _Dictionary:
    facts = store.dictionary(address)
    return _Dictionary(address, facts, store.features(address, ["layer"])["layer"].to_pylist())


def _place(
    label: Label, known: dict[str, list[_Dictionary]]
) -> tuple[_Dictionary | None, int | None]:
    fits = [
        (one, feature)
        for one in known.get(label.dictionary, [])
        if (feature := one.feature(label)) is not None
    ]
    if len(fits) > 1:
        both = " and ".join(one.address for one, _ in fits[:2])
        raise InputError(f"{_told(label)} could be of {both}: give one --as a layer")
    return fits[0] if fits else (None, None)


def _unknown(
    labels: Iterable[Label],
    measurements: Callable[[], Iterator[Measurement]] | None,
    known: dict[str, list[_Dictionary]],
) -> list[str]:
    """The features that none of the dictionaries has, each once, and where they are named."""
    rows = (row.label for row in measurements()) if measurements else ()
    found: dict[tuple[str, int | None, int], str] = {}
    for label in chain(labels, rows):
        if _place(label, known)[1] is None:
            found.setdefault((label.dictionary, label.layer, label.feature), _told(label))
    return list(found.values())


def _compared(
    store: Store, incoming: Incoming, known: dict[str, list[_Dictionary]]
) -> list[Comparison]:
    stated: dict[str, dict[int, float]] = {}
    for label, density in (pair for pairs in incoming.densities.values() for pair in pairs):
        one, feature = _place(label, known)
        if one is not None and feature is not None:
            stated.setdefault(one.address, {})[feature] = density
    found = (compare(store, address, rows) for address, rows in stated.items())
    return [one for one in found if one is not None]


def _placed(
    rows: Iterable[Measurement], known: dict[str, list[_Dictionary]]
) -> Iterator[tuple[str, int, Measurement]]:
    """The measurements of features that are known, each with its address and feature."""
    for row in rows:
        one, feature = _place(row.label, known)
        if one is not None and feature is not None:
            yield one.address, feature, row


def _told(label: Label) -> str:
    layer = "" if label.layer is None else f" of layer {label.layer}"
    return f"{label.feature}{layer} ({label.place})"


def _refusal(path: Path, unknown: list[str], known: dict[str, list[_Dictionary]]) -> str:
    shown = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
    have = "; ".join(
        f"{one.address} has 0 to {len(one.layers) - 1}, layer {_span(one.layers)}"
        for one in {o.address: o for options in known.values() for o in options}.values()
    )
    count = f"{len(unknown):,} unknown feature{'s' if len(unknown) > 1 else ''}"
    return (
        f"{path} names {count}: {shown}; {have}. Nothing was written; "
        "--skip-unknown takes the others"
    )


def _span(layers: list[int]) -> str:
    low, high = min(layers), max(layers)
    return str(low) if low == high else f"{low} to {high}"


def _new_explanations(
    store: Store,
    addresses: Sequence[str],
    explanations: Sequence[tuple[Explanation, bool]],
    had: Mapping[tuple[str, int], Sequence[Note]],
) -> list[Explanation]:
    """Those that the store does not have, each once."""
    old = {e.key: e for address in addresses for e in store.explanations(address)}
    texts = {(e.dictionary, e.feature, e.text) for e in old.values()}
    texts |= {
        (*place, text)
        for place, some in had.items()
        for note in some
        for text in (note.text, str(note.detail.get("description")))
    }
    fresh: dict[str, Explanation] = {}
    for one, unsigned in explanations:
        before = fresh.get(one.key) or old.get(one.key)
        if before is not None:
            if one.scores and not before.scores:
                detail = {**one.detail, **before.detail}
                fresh[one.key] = replace(before, scores=one.scores, detail=detail)
        elif not unsigned or (one.dictionary, one.feature, one.text) not in texts:
            fresh[one.key] = one
    return list(fresh.values())


def _new_notes(
    notes: Sequence[tuple[Note, bool]], had: Mapping[tuple[str, int], Sequence[Note]]
) -> list[Note]:
    """Those that the store does not have, each once."""
    fresh: dict[str, Note] = {}
    keys = {note.key for some in had.values() for note in some}
    for note, unsigned in notes:
        here = had.get((note.dictionary, note.feature), [])
        same = any(same_note(note, other) for other in [*here, joined(here)])
        if note.key not in keys and not (unsigned and same):
            fresh.setdefault(note.key, note)
    return list(fresh.values())
