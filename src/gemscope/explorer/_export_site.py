"""Pages of chosen features as plain files: they open from a disk, or lie on any server of files."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.activations import write_whole
from gemscope.errors import InputError
from gemscope.features import Store

from . import _feature_draw as draw
from ._feature_record import record
from ._feature_store import KeptStore
from ._render import environment, translator

_STATIC = Path(__file__).parent / "static"
_PAGES = "features"
"""Folder of the features' pages."""
_LIST = "site.json"
"""What an export wrote, so that the next one can take its own pages away."""
_NAME = re.compile(r"[\w.-]+\.html", re.ASCII)

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    pages: int

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"


def labelled(store: Store) -> list[Key]:
    """Every feature that has a note or an explanation, in the order of the store."""
    indexed = {d["address"] for d in store.dictionaries()}
    found: set[Key] = set()
    for name in ("notes", "explanations"):
        rows = store.rows(name, "true", ["dictionary", "feature"]).to_pylist()
        found |= {(r["dictionary"], r["feature"]) for r in rows}
    return sorted(key for key in found if key[0] in indexed)


def best_of(store: Store, address: str, n: int) -> list[Key]:
    """The `n` features of a dictionary whose explanations have the best scores; after them those
    without a score, the highest maximum first. Features that never fire are left out.
    """
    if n < 1:
        raise InputError(f"the top {n} are none; give 1 or more")
    scores: dict[int, float] = {}
    for one in store.explanations(address):
        scores[one.feature] = max(scores.get(one.feature, 0.0), one.score or 0.0)
    store.dictionary(address)
    highest = store.figures()[address][:, 1]
    alive = [i for i in range(len(highest)) if highest[i] > 0]
    alive.sort(key=lambda i: (-scores.get(i, -1.0), -float(highest[i]), i))
    return [(address, i) for i in alive[:n]]


def export_site(
    store: Store,
    features: Sequence[Key],
    folder: Path,
    *,
    force: bool = False,
    told: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> Exported:
    """Write `index.html`, a page for each of `features`, `style.css` and `site.js`.

    Links are relative and nothing is asked of any server. Each file is there whole or not at all,
    the list last. A folder with something in it is refused unless `force` says to write over it;
    pages of an earlier export that are not written again are then removed, and nothing else.

    Raises:
        InputError: No feature chosen, one that is not there, or a folder that is in use.
    """
    chosen = list(dict.fromkeys(features))
    if not chosen:
        raise InputError("no feature is chosen: name some with --features, --labelled or --top")
    kept = KeptStore(store)
    for address, feature in chosen:
        kept.check_feature(address, feature)
    before = _earlier(folder, force)
    names = _names(chosen)
    try:
        (folder / _PAGES).mkdir(parents=True, exist_ok=True)
        rows = []
        for done, key in enumerate(chosen):
            told("pages", done, len(chosen))
            found = record(kept, *key)
            beside = [
                names[chosen[i]] if 0 <= i < len(chosen) else None for i in (done - 1, done + 1)
            ]
            write_whole(folder / _PAGES / names[key], _feature_page(found, key[0], names, beside))
            rows.append(_row(found, f"{_PAGES}/{names[key]}"))
        told("pages", len(chosen), len(chosen))
        styles = b"".join((_STATIC / f).read_bytes() for f in ("style.css", "feature.css"))
        write_whole(folder / "style.css", styles)
        write_whole(folder / "site.js", (_STATIC / "feature.site.js").read_bytes())
        write_whole(folder / "index.html", _rendered("site_index.html", rows=rows))
        written = sorted(names.values())
        write_whole(folder / _LIST, json.dumps({"pages": written}, indent=1).encode())
        for name in before - set(written):
            (folder / _PAGES / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return Exported(folder, len(chosen))


def _earlier(folder: Path, force: bool) -> set[str]:
    """The pages of an export that is there already."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the site")
    if not folder.exists() or not any(folder.iterdir()):
        return set()
    if not force:
        raise InputError(f"{folder} is not empty; name a new folder, or write over it with --force")
    try:
        pages = json.loads((folder / _LIST).read_bytes())["pages"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    # Names from a file that anybody may have changed: of plain pages only.
    return {n for n in pages if isinstance(n, str) and _NAME.fullmatch(n)}


def _names(features: Iterable[Key]) -> dict[Key, str]:
    """A file name for each feature: of letters that every system takes, no two the same."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for address in dict.fromkeys(a for a, _ in features):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", address).strip(".-") or "dictionary"
        stem, number = plain, 1
        # Case makes no difference to some systems.
        while stem.lower() in taken:
            number += 1
            stem = f"{plain}_{number}"
        taken.add(stem.lower())
        stems[address] = stem
    return {(a, f): f"{stems[a]}-{f}.html" for a, f in features}


def _feature_page(
    found: dict[str, Any], address: str, names: dict[Key, str], beside: Sequence[str | None]
) -> bytes:
    """The page of a feature; of others only those that are exported too are linked."""
    return _rendered(
        "site_feature.html", r=found, draw=draw, of=lambda number: names.get((address, number)),
        previous=beside[0], following=beside[1], try_url=lambda _context: None,
    )  # fmt: skip


def _row(found: dict[str, Any], url: str) -> dict[str, Any]:
    """A feature in the list."""
    notes = [n for n in found["notes"] if not n["replaced"]]
    best = found["explanations"][0] if found["explanations"] else None
    said = notes[0]["text"] if notes else best["text"] if best else None
    return {
        "url": url, "address": found["address"], "feature": found["feature"], "said": said,
        "is_note": bool(notes), "score": None if notes or not best else best["score"],
        "density": found["density"], "max": found["max"], "tags": found["tags"],
        "tokens": [t["token"] for t in (found["tokens"] or [])[:5]],
        "promoted": [t["token"] for t in (found["promoted"] or [])[:5]],
    }  # fmt: skip


def _rendered(template: str, **values: Any) -> bytes:
    made = environment().get_template(template)
    page = made.render(t=translator("en"), version=__version__, **values)
    # A lone surrogate, as half a token may be, has no bytes.
    return page.encode("utf-8", "replace")
