"""The JSON catalog of a store's dictionaries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.features import Explanation, Note

from ._catalog import FORMAT, VERSION
from ._files import dump, finite, new_file
from ._labels import best_explanation, human_word, joined, plain_explanation, plain_note
from ._measured import Measured, Progress

_CONTEXTS = 5
_HEAD = (
    "address", "kind", "model", "reads", "writes", "d_sae", "nominal_l0", "digest", "tokens",
    "documents", "text_key", "version",
)  # fmt: skip
LOST = (
    "of activations: all but threshold, maximum and the text of five contexts "
    "(no values, histograms, densities or tokens)",
    "decoder vectors, logits and the numbers behind related features",
)
LOST_BARE = (
    *LOST,
    "all explanations but the best; authors, dates and scores",
    "which dictionary it is of: give --as when importing it",
)


def write_catalog(
    target: Path,
    measured: Sequence[Measured],
    *,
    bare: bool = False,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> int:
    """Write a catalog, a feature a line; the number of features.

    `bare` gives a plain list of objects that have the keys of the field's catalogs and no others.
    """
    total = sum(len(one.chosen) for one in measured)
    done = 0
    with new_file(target, force=force) as stream:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "gemscope": __version__,
            "dictionaries": [finite({k: one.dictionary.get(k) for k in _HEAD}) for one in measured],
        }
        stream.write(b"[" if bare else (dump(head, indent=1)[:-2] + ',\n "features": [').encode())
        for one in measured:
            for row in one.rows():
                entry = dump(entry_of(one, row, bare=bare))
                stream.write((",\n  " if done else "\n  ").encode() + entry.encode())
                done += 1
                progress("writing", done, total)
        stream.write(b"\n]\n" if bare else b"\n ]\n}\n")
    return done


def entry_of(one: Measured, row: dict[str, Any], *, bare: bool = False) -> dict[str, Any]:
    """A feature of a catalog."""
    feature, fired = int(row["feature"]), bool(row["count"])
    entry = {
        "dictionary": one.address,
        "layer": int(row["layer"]),
        "feature_index": feature,
        "activation_pattern": {
            "threshold": row["threshold"],
            "max_activation": row["max"] if fired else 0.0,
            "typical_contexts": one.excerpts(feature, _CONTEXTS) if fired else [],
        },
        "related_features": one.related(row),
    }
    labels = one.explanations.get(feature, []), one.notes.get(feature, [])
    return finite(with_labels(entry, *labels, bare=bare))


def with_labels(
    measured: dict[str, Any],
    explanations: Sequence[Explanation],
    notes: Sequence[Note],
    *,
    bare: bool = False,
) -> dict[str, Any]:
    """An entry: what was measured of a feature, and what is said of it."""
    best, whole = best_explanation(explanations), joined(notes)
    word = human_word(notes)
    entry = {
        "layer": measured["layer"],
        "feature_index": measured["feature_index"],
        # A human's word first, then the best explanation.
        "description": word if word.strip() else "" if best is None else best.text,
        "activation_pattern": measured["activation_pattern"],
        "related_features": measured["related_features"],
        "manual_interpretation": _interpretation(whole, bare=bare),
    }
    if bare:
        return entry
    entry = {"dictionary": measured.get("dictionary", "")} | entry
    if not entry["dictionary"]:
        del entry["dictionary"]
    entry["explanations"] = [plain_explanation(e) for e in explanations]
    entry["notes"] = [plain_note(n) for n in notes]
    for detail in (label.detail for some in (explanations, notes) for label in some):
        carried = detail.get("catalog")
        if isinstance(carried, dict):
            _give_back(entry, carried)
    return entry


def _interpretation(note: Note | None, *, bare: bool) -> dict[str, Any]:
    if note is None:
        return {"confidence": None, "notes": "", "known_limitations": []}
    found: dict[str, Any] = {
        "confidence": note.confidence,
        "notes": note.text,
        "known_limitations": list(note.limitations),
    }
    carried = note.detail.get("interpretation")
    carried = dict(carried) if isinstance(carried, dict) else {}
    # What was a word, or one text for a list, is given back as it was.
    word, limits = carried.pop("confidence", None), carried.pop("known_limitations", None)
    if note.confidence is None and isinstance(word, str):
        found["confidence"] = word
    if isinstance(limits, str) and [limits] == list(note.limitations):
        found["known_limitations"] = limits
    if bare:
        return found
    return carried | found | ({"author": note.author} if note.author else {})


def _give_back(entry: dict[str, Any], carried: dict[str, Any]) -> None:
    """Put back what an imported catalog held beside labels; what was measured here stays."""
    for key, value in carried.items():
        if key == "related_features" and isinstance(value, list):
            entry[key] = entry[key] + [one for one in value if one not in entry[key]]
        elif key == "activation_pattern" and isinstance(value, dict):
            entry[key] = {**value, **entry[key]}
        else:
            entry.setdefault(key, value)
