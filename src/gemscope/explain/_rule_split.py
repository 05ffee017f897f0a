"""Which documents rules are learned on, and which they are scored on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Text


@dataclass(frozen=True, slots=True)
class DocumentSplit:
    """Documents by number, and their counted places, ascending."""

    training: np.ndarray
    held_out: np.ndarray
    training_places: np.ndarray
    held_out_places: np.ndarray


def split_documents(text: Text, *, held_out: float, tokens: int, seed: int) -> DocumentSplit:
    """Part whole documents in two, `held_out` of each source's tokens on the second side.

    A hash of path and seed orders the documents, and each is dealt to the side that lacks most.
    Documents of the same tokens stay together. Of a text with more than `tokens` tokens, documents
    are left out altogether, in the same way.
    """
    if not 0 < held_out < 1:
        raise InputError(f"{held_out} of the tokens cannot be held out; give a share, such as 0.4")
    places = np.flatnonzero(text.counts)
    sizes = np.bincount(text.document_of(places), minlength=len(text.paths))
    groups = _groups(text, sizes)
    share = tokens / max(int(sizes.sum()), 1)
    used = [group for group, kept in _dealt(groups, text, sizes, share, seed) if kept]
    if len(used) < 2:
        used = groups
    if len(used) < 2:
        raise InputError(
            "rules are learned on some documents and scored on others, and this text has but one; "
            "index a text of two documents or more"
        )
    sides = _dealt(used, text, sizes, held_out, seed + 1)
    if len({side for _, side in sides}) < 2:  # each source has but one document
        sides = [(group, place % 2 == 1) for place, (group, _) in enumerate(sides)]
    document = text.document_of(places)
    training, held = (
        np.array(sorted(d for group, side in sides if side is on for d in group), dtype=np.int64)
        for on in (False, True)
    )
    return DocumentSplit(
        training, held, places[np.isin(document, training)], places[np.isin(document, held)]
    )


def _groups(text: Text, sizes: np.ndarray) -> list[list[int]]:
    """Documents that hold something, those of the same tokens as one."""
    found: dict[bytes, list[int]] = {}
    borders = np.searchsorted(text.document, np.arange(len(text.paths) + 1))
    for number in np.flatnonzero(sizes):
        first, stop = text.offsets[borders[number]], text.offsets[borders[number + 1]]
        key = hashlib.sha256(text.ids[first:stop].tobytes()).digest()
        found.setdefault(key, []).append(int(number))
    return list(found.values())


def _dealt(
    groups: Sequence[list[int]], text: Text, sizes: np.ndarray, share: float, seed: int
) -> list[tuple[list[int], bool]]:
    """Each group, and whether it is among about `share` of the tokens of its source."""
    ordered = sorted(
        groups, key=lambda g: hashlib.sha256(f"{seed}\0{text.paths[g[0]]}".encode()).digest()
    )
    seen, taken = np.zeros(len(text.sources)), np.zeros(len(text.sources))
    out = []
    for group in ordered:
        source, size = int(text.source[group[0]]), int(sizes[group].sum())
        seen[source] += size
        takes = bool(taken[source] + size / 2 <= share * seen[source])
        taken[source] += size * takes
        out.append((group, takes))
    return out


def ranges(numbers: np.ndarray) -> str:
    """Numbers as runs: `0-3,7`."""
    if not len(numbers):
        return ""
    borders = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = np.split(np.asarray(numbers), borders)
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
