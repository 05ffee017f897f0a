"""A catalog store read for one feature after the other: what they share is kept in memory.

A query of a table costs as much as all else of a page, and each call of it hands the interpreter
to another thread and back, which takes far longer beside a model at work. So rows are taken by
where they are, that is remembered until the table has a new version, and whether it has one is
asked once in a while.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemscope.features import Explanation, KnownPieces, Note, Store, Text, in_order, quoted

_DIRECTIONS = 2**30
"""Bytes of decoder rows that are kept."""
_OWNER = {"features": "run", "explanations": "dictionary"}
"""The column that says which dictionary a row belongs to, of tables whose rows are taken by place;
contexts are too many for that, and are asked for.
"""
_FRESH = 0.3
"""Seconds for which a table is taken to be as it was; what is written here is seen at once."""
_RECORDS = 64
"""Features whose records are kept, for a page back, another view or a file."""
_TOGETHER, _BLOCKS = 16, 128
"""Features whose rows are taken at once, which takes as long as one's: readers go from one to the
next; and how many such blocks are kept.
"""

Key = tuple[str, int]


@dataclass(frozen=True)
class _Places:
    """Where the rows of each feature are, in one version of a table."""

    version: int
    owners: dict[str, int]
    keys: np.ndarray
    """int64 `[n_rows]`, ascending: owner and feature in one number."""
    ids: np.ndarray

    @classmethod
    def of(cls, table: Any, version: int, owner: str) -> "_Places":
        asked = table.search().select([owner, "feature"]).with_row_id(True).limit(2**31 - 1)
        rows = asked.to_arrow()
        names = rows[owner].combine_chunks().dictionary_encode()
        codes = names.indices.to_numpy().astype(np.int64)
        keys = (codes << 32) + rows["feature"].to_numpy()
        order = np.argsort(keys, kind="stable")
        owners = {name: code for code, name in enumerate(names.dictionary.to_pylist())}
        return cls(version, owners, keys[order], rows["_rowid"].to_numpy()[order])

    def find(self, wanted: Iterable[Key]) -> list[int]:
        """Row ids of some features, in their order in the table."""
        keys = [(self.owners[o] << 32) + f for o, f in set(wanted) if o in self.owners]
        low = np.searchsorted(self.keys, keys, "left")
        high = np.searchsorted(self.keys, keys, "right")
        found = [self.ids[a:b] for a, b in zip(low, high, strict=True)]
        return sorted(np.concatenate(found).tolist()) if found else []


class KeptStore(Store):
    """The store in the folder of another one, for a server: several threads may read it."""

    def __init__(self, store: Store):
        super().__init__(store.folder)
        self._lock = threading.RLock()
        self._looked: dict[str, tuple[float, int]] = {}
        """When each table was looked at, and its version then."""
        self._places: dict[str, _Places] = {}
        self._empty: dict[str, Any] = {}
        self._blocks: OrderedDict[tuple[str, int, str, int], Any] = OrderedDict()
        self._records: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        self._pieces: dict[str, KnownPieces] = {}
        self._texts: dict[str, Text] = {}
        self._said: tuple[int, dict[Key, list[Note]]] | None = None
        self._units: OrderedDict[str, np.ndarray] = OrderedDict()
        self._now = threading.local()

    @contextmanager
    def one_look(self) -> Iterator[None]:
        """Whether tables have new versions is asked once inside, not at every read."""
        self._now.tables, self._now.known = set(), None
        try:
            yield
        finally:
            self._now.tables = self._now.known = None

    def table(self, name: str) -> Any:
        """A table as it was a moment ago; while it is locked it stays so."""
        looked = getattr(self._now, "tables", None)
        with self._lock:
            known = self._looked.get(name)
            fresh = known is not None and time.monotonic() - known[0] < _FRESH
            if fresh or (known is not None and looked is not None and name in looked):
                found = self._tables[name]
            else:
                found = super().table(name)
                self._looked[name] = (time.monotonic(), found.version)
        if looked is not None:
            looked.add(name)
        return found

    def _version(self, name: str) -> int:
        with self._lock:
            self.table(name)
            return self._looked[name][1]

    def _merge(self, name: str, rows: list[dict[str, Any]], *, update: bool = True) -> None:
        with self._lock:
            super()._merge(name, rows, update=update)
            self._looked.pop(name, None)

    def remembered(
        self, address: str, feature: int, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record that `make` makes of a feature, while no table it is made of has changed; what
        is given out is not to be changed either.
        """
        versions = (self._version(n) for n in ("contexts", "dictionaries", "notes", *_OWNER))
        key = (address, feature, *versions)
        with self._lock:
            found = self._records.get(key)
        if found is None:
            found = make()
        with self._lock:
            self._records[key] = found
            self._records.move_to_end(key)
            while len(self._records) > _RECORDS:
                self._records.popitem(last=False)
        return found

    def _dictionaries(self) -> dict[str, dict[str, Any]]:
        looking = getattr(self._now, "tables", None) is not None
        known = self._now.known if looking else None
        if known is None:
            known = super()._dictionaries()
            if looking:
                self._now.known = known
        return known

    def feature(self, address: str, feature: int) -> dict[str, Any]:
        """The row of one feature."""
        self.check_feature(address, feature)
        found = self._rows_of("features", self.dictionary(address)["run"], feature)
        left_out = {"run", "words", "promotes", "_rowid"} & set(found.column_names)
        return found.drop_columns(sorted(left_out)).to_pylist()[0]

    def text(self, address: str) -> Text:
        """The text a dictionary was indexed on."""
        key = self.dictionary(address)["text_key"]
        if key not in self._texts:
            self._texts[key] = super().text(address)
        return self._texts[key]

    def pieces(self, address: str) -> KnownPieces:
        """What gives the text of each token of a dictionary's model."""
        name = self.dictionary(address)["loaded_model"]
        if name not in self._pieces:
            self._pieces[name] = KnownPieces(self.tokenizer(address))
        return self._pieces[name]

    def contexts(self, address: str, feature: int | None = None) -> list[dict[str, Any]]:
        """Contexts of one feature or of all, by feature, group and rank."""
        if feature is None:
            return super().contexts(address)
        self.check_feature(address, feature)
        return in_order(self._rows_of("contexts", self.dictionary(address)["run"], feature))

    def explanations(
        self, address: str | None = None, feature: int | None = None
    ) -> list[Explanation]:
        """Explanations, the best scored of a feature first."""
        if address is None or feature is None:
            return super().explanations(address, feature)
        rows = self._rows_of("explanations", address, feature).to_pylist()
        found = [Explanation.of(row) for row in rows]
        return sorted(found, key=lambda e: (-(e.score or 0.0), e.method, e.text))

    def notes(self, address: str | None = None, feature: int | None = None) -> list[Note]:
        """What people wrote, the newest of a feature first."""
        if address is None or feature is None:
            return super().notes(address, feature)
        return list(self._all_notes().get((address, feature), []))

    def _all_notes(self) -> dict[Key, list[Note]]:
        with self._lock:
            version = self._version("notes")
            if self._said is None or self._said[0] != version:
                by_feature: dict[Key, list[Note]] = {}
                for note in super().notes():
                    by_feature.setdefault((note.dictionary, note.feature), []).append(note)
                self._said = (version, by_feature)
            return self._said[1]

    def described(self, features: Iterable[Key]) -> dict[Key, tuple[str, float | None]]:
        """What each of some features is called, with the score: a note before any explanation."""
        wanted = list(dict.fromkeys(features))
        columns = ["dictionary", "feature", "text", "score", "created"]
        rows = self._taken("explanations", wanted, columns).to_pylist() if wanted else []
        rows.sort(key=lambda r: (r["score"] or 0.0, r["created"]))
        out = {(r["dictionary"], r["feature"]): (r["text"], r["score"]) for r in rows}
        notes = self._all_notes()
        out |= {k: (notes[k][0].text, notes[k][0].confidence) for k in wanted if k in notes}
        return out

    def directions(self, address: str) -> np.ndarray:
        """Decoder rows of length one, float32 `[d_sae, d_out]`; those of a few are kept."""
        run = self.dictionary(address)["run"]
        with self._lock:
            if run not in self._units:
                vectors = self.vectors(address)
                norms = np.linalg.norm(vectors, axis=1, keepdims=True)
                self._units[run] = vectors / np.maximum(norms, 1e-30)
                while len(self._units) > 1 and _bytes(self._units) > _DIRECTIONS:
                    self._units.popitem(last=False)
            self._units.move_to_end(run)
            return self._units[run]

    def _rows_of(self, name: str, owner: str, feature: int) -> Any:
        """The rows of one feature, from a block of its neighbours' too."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        with self._lock:
            block = feature // _TOGETHER
            key = (name, self._version(name), owner, block)
            if key not in self._blocks:
                numbers = range(block * _TOGETHER, (block + 1) * _TOGETHER)
                if name in _OWNER:
                    self._blocks[key] = self._taken(name, [(owner, n) for n in numbers])
                else:
                    self._blocks[key] = self.rows(
                        name, f"run = {quoted(owner)} AND feature >= {numbers.start} "
                        f"AND feature < {numbers.stop}"
                    )  # fmt: skip
                while len(self._blocks) > _BLOCKS:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(key)
            found = self._blocks[key]
        return found.filter(pc.equal(found["feature"], feature))

    def _taken(self, name: str, wanted: Sequence[Key], columns: Sequence[str] | None = None) -> Any:
        """The rows of some features, taken from where they are."""
        with self._lock:
            table, version = self.table(name), self._version(name)
            known = self._places.get(name)
            if known is None or known.version != version:
                known = self._places[name] = _Places.of(table, version, _OWNER[name])
            ids = known.find(wanted)
            if not ids:
                if name not in self._empty:
                    self._empty[name] = table.schema.empty_table()
                return self._empty[name]
            asked = table.take_row_ids(ids)
            return (asked if columns is None else asked.select(list(columns))).to_arrow()


def _bytes(arrays: "OrderedDict[str, np.ndarray]") -> int:
    return sum(array.nbytes for array in arrays.values())
