"""The catalog store: a folder of LanceDB tables, beside them the text and kept activations.

`store.json` says that a folder is one, and of which version. A dictionary's rows carry the name of
the run that made them, and its row in `dictionaries` says which run is in force: it is written
last, in one commit, so that readers see all of a run or nothing of it. Every write makes a new
version of a table; a reader keeps the one it opened.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemscope.activations import write_whole
from gemscope.errors import InputError, did_you_mean

from ._activations import Activations, read_json, read_text_arrays
from ._lance import connect
from ._pieces import token_pieces
from ._records import Explanation, Note
from ._text import Text

_MANY_VECTORS = 100_000
"""Decoder rows beyond which searching all of them takes too long."""
_BEHIND = 2_000
"""Rows that a search looks through one by one before its index is brought up to date."""

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]


class Store:
    """An opened catalog store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._db = connect(folder)
        self._tables: dict[str, Any] = {}
        self._known: tuple[int, dict[str, dict[str, Any]]] | None = None
        self._directions: tuple[str, np.ndarray] | None = None
        self._figures: tuple[int, dict[str, np.ndarray]] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """The store in the folder `path`; one of an older layout is brought up to date."""
        from ._migrate import check_version, move_forward
        from ._tables import VERSION

        folder = Path(path).expanduser()
        known = read_json(folder / "store.json")
        if known is None:
            raise InputError(
                f"no catalog store at {folder}; gemscope index ADDRESS --to {folder} makes one"
            )
        opened = cls(folder)
        if check_version(folder, known) < VERSION:
            move_forward(opened)
        return opened

    @classmethod
    def create(cls, path: str | Path) -> "Store":
        """The store in the folder `path`, which is made if it is not there."""
        from ._migrate import STEPS
        from ._tables import TABLES, VERSION

        folder = Path(path).expanduser()
        if (folder / "store.json").is_file():
            return cls.open(folder)
        if folder.exists() and (not folder.is_dir() or _strange(folder)):
            raise InputError(f"{folder} holds something else; name a new folder for the store")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}") from None
        made = cls(folder)
        begun = made._names()
        for name, schema in TABLES.items():
            if name not in begun:
                made._db.create_table(name, schema=schema, exist_ok=True)
        # A table that an older gemscope made before it was interrupted may lack something.
        for step in STEPS.values():
            step(made)
        write_whole(folder / "store.json", json.dumps({"version": VERSION}).encode())
        return made

    def table(self, name: str) -> Any:
        """A table of LanceDB, as it is now."""
        if name not in self._tables:
            try:
                self._tables[name] = self._db.open_table(name)
            except (ValueError, OSError, RuntimeError) as error:
                raise InputError(
                    f"the table {name} of {self.folder} is missing or damaged "
                    f"({_first_line(error)}); index again into a new folder"
                ) from None
        self._tables[name].checkout_latest()
        return self._tables[name]

    def _version(self, name: str) -> int:
        """Of a table as it is now: every write makes another."""
        return self.table(name).version

    def rows(
        self, name: str, where: str, columns: Sequence[str] | None = None, limit: int | None = None
    ) -> "pa.Table":
        """Rows of a table that satisfy `where`, in the language of SQL."""
        query = self.table(name).search().where(where)
        if columns is not None:
            query = query.select(list(columns))
        return query.limit(limit if limit is not None else 2**31 - 1).to_arrow()

    def dictionaries(self) -> list[dict[str, Any]]:
        """What is known of each dictionary indexed here, by address."""
        return [dict(known) for known in self._dictionaries().values()]

    def dictionary(self, address: str) -> dict[str, Any]:
        """What is known of one dictionary."""
        known = self._dictionaries()
        if address not in known:
            near = did_you_mean(address, list(known)) if known else "it holds none"
            raise InputError(f"{address} is not indexed in {self.folder}; {near}")
        return dict(known[address])

    def _dictionaries(self) -> dict[str, dict[str, Any]]:
        """By address; read again when the table has a new version."""
        table, version = self.table("dictionaries"), self._version("dictionaries")
        if self._known is None or self._known[0] != version:
            rows = sorted(table.to_arrow().to_pylist(), key=lambda row: row["address"])
            known = {r["address"]: json.loads(r["facts"]) | {"run": r["run"]} for r in rows}
            self._known = (version, known)
        return self._known[1]

    def check_feature(self, address: str, feature: int) -> None:
        """Refuse a feature that the dictionary does not have."""
        d_sae = self.dictionary(address)["d_sae"]
        if not 0 <= feature < d_sae:
            raise InputError(f"no feature {feature}: {address} has 0 to {d_sae - 1}")

    def features(self, address: str, columns: Sequence[str] | None = None) -> "pa.Table":
        """One row of each feature, in their order."""
        run = self.dictionary(address)["run"]
        wanted = None if columns is None else list(dict.fromkeys(["feature", *columns]))
        return self._own("features", run, wanted).sort_by("feature")

    def feature(self, address: str, feature: int) -> dict[str, Any]:
        """The row of one feature."""
        self.check_feature(address, feature)
        run = self.dictionary(address)["run"]
        found = self.rows("features", f"run = {quoted(run)} AND feature = {int(feature)}")
        return found.drop_columns(["run", "words", "promotes"]).to_pylist()[0]

    def figures(self) -> dict[str, np.ndarray]:
        """Density and maximum of each feature, float64 `[d_sae, 2]`, by dictionary; NaN where there
        is no row. They are kept until the store changes.
        """
        table, version = self.table("features"), self._version("features")
        if self._figures is None or self._figures[0] != version:
            columns = ["run", "feature", "density", "max"]
            found = table.search().select(columns).limit(2**31 - 1).to_arrow()
            runs = found["run"].combine_chunks().dictionary_encode()
            codes = runs.indices.to_numpy()
            values = np.stack([found[n].to_numpy().astype(np.float64) for n in columns[2:]], axis=1)
            numbers, by_run = found["feature"].to_numpy(), {}
            for code, run in enumerate(runs.dictionary.to_pylist()):
                own = codes == code
                rows = np.full((int(numbers[own].max()) + 1, 2), np.nan)
                rows[numbers[own]] = values[own]
                by_run[run] = rows
            self._figures = (version, by_run)
        by_run = self._figures[1]
        return {
            address: by_run.get(known["run"], np.full((known["d_sae"], 2), np.nan))
            for address, known in self._dictionaries().items()
        }

    def vectors(self, address: str) -> np.ndarray:
        """Decoder rows, float32 `[d_sae, d_out]`; of several layers, what a feature writes to the
        layer it is read in.
        """
        known = self.dictionary(address)
        table = self._own(f"vectors_{known['d_out']}", known["run"], ["feature", "vector"])
        table = table.sort_by("feature")
        flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(table), known["d_out"])

    def directions(self, address: str) -> np.ndarray:
        """Decoder rows of length one, float32 `[d_sae, d_out]`; those asked for last are kept."""
        run = self.dictionary(address)["run"]
        if self._directions is None or self._directions[0] != run:
            vectors = self.vectors(address)
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._directions = (run, vectors / np.maximum(norms, 1e-30))
        return self._directions[1]

    def contexts(self, address: str, feature: int | None = None) -> list[dict[str, Any]]:
        """Contexts of one feature or of all, by feature, group and rank."""
        run = self.dictionary(address)["run"]
        if feature is None:
            found = self._own("contexts", run)
        else:
            self.check_feature(address, feature)
            found = self.rows("contexts", f"run = {quoted(run)} AND feature = {int(feature)}")
        return in_order(found)

    def text(self, address: str) -> Text:
        """The text a dictionary was indexed on."""
        return read_text_arrays(self.folder / "texts" / self.dictionary(address)["text_key"][:16])

    def activations(self, address: str) -> Activations | None:
        """Every activation of a dictionary by feature, if they were kept."""
        folder = self.folder / "activations" / self.dictionary(address)["collected"]
        return Activations.open(folder) if (folder / "index.json").is_file() else None

    def tokenizer(self, address: str) -> Any:
        """The tokenizer of a dictionary's model."""
        from gemscope.hub import fetch_model, load_tokenizer, model_source

        known = self.dictionary(address)
        source = model_source(known["loaded_model"])
        if not Path(source).is_dir():
            source = str(fetch_model(known["loaded_model"]))
        return load_tokenizer(source)

    def pieces(self, address: str) -> Callable[[Sequence[int]], list[str]]:
        """What gives the text of each token of a dictionary's model."""
        return partial(token_pieces, self.tokenizer(address))

    def explanations(
        self, address: str | None = None, feature: int | None = None
    ) -> list[Explanation]:
        """Explanations, the best scored of a feature first."""
        rows = self.rows("explanations", _which(address, feature)).to_pylist()
        found = [Explanation.of(row) for row in rows]
        return sorted(
            found, key=lambda e: (e.dictionary, e.feature, -(e.score or 0.0), e.method, e.text)
        )

    def add_explanations(self, rows: Sequence[Explanation]) -> None:
        """Add explanations; one that is there already gets the new scores."""
        self._merge("explanations", [e.row() for e in rows])
        self._index("explanations", "text", "words", behind=_BEHIND)

    def notes(self, address: str | None = None, feature: int | None = None) -> list[Note]:
        """What people wrote, the newest of a feature first."""
        found = [Note.of(row) for row in self.rows("notes", _which(address, feature)).to_pylist()]
        found.sort(key=lambda n: n.created, reverse=True)
        return sorted(found, key=lambda n: (n.dictionary, n.feature))

    def add_notes(self, rows: Sequence[Note]) -> None:
        """Add notes; none that is there is changed."""
        self._merge("notes", [n.row() for n in rows], update=False)
        self._index("notes", "text", "words", behind=_BEHIND)

    def table_of(self, name: str, schema: "pa.Schema") -> Any:
        """A table, made if it is not there."""
        self._db.create_table(name, schema=schema, exist_ok=True)
        return self.table(name)

    def commit(
        self, address: str, run: str, d_sae: int, facts: Mapping[str, Any], tables: Sequence[str]
    ) -> None:
        """Put the rows of `run` in force as those of `address`, then remove those before."""
        import pyarrow as pa

        from ._tables import DICTIONARIES, RUNS

        said = json.dumps(dict(facts))
        row = {"address": address, "run": run, "d_sae": d_sae, "facts": said}
        merge = self.table("dictionaries").merge_insert("address")
        merge.when_matched_update_all().when_not_matched_insert_all().execute(
            pa.Table.from_pylist([row], DICTIONARIES)
        )
        ran = {"run": run, "created": facts["created"], "facts": said}
        self.table("runs").add(pa.Table.from_pylist([ran], RUNS))
        for name in tables:
            self.table(name).delete(f"dictionary = {quoted(address)} AND run != {quoted(run)}")

    def refresh(self) -> None:
        """Bring the indices that searching uses up to date."""
        for name, column in (("features", "words"), ("explanations", "text"), ("notes", "text")):
            self._index(name, column, "words")
        for name in ("features", "contexts", "explanations", "notes"):
            self._index(name, "feature", "numbers")
        for name in ("features", "contexts", *self.vector_tables()):
            self._index(name, "run", "names")
        self._index("features", "promotes", "labels")
        for name in self.vector_tables():
            if self.table(name).count_rows() > _MANY_VECTORS:
                self._index(name, "vector", "vectors")

    def _index(self, name: str, column: str, kind: str, behind: int = 0) -> None:
        """Make an index, or bring it up to date if more than `behind` rows are not in it."""
        from lancedb.index import FTS, Bitmap, BTree, IvfPq, LabelList

        table = self.table(name)
        if not table.count_rows():
            return
        known = [i.name for i in table.list_indices() if column in i.columns]
        if known:
            if table.index_stats(known[0]).num_unindexed_rows > behind:
                table.optimize()
            return
        made = {
            # Tokens are no words of English: of those nothing is stemmed, nothing left out.
            "words": lambda: FTS(
                stem=column == "text", remove_stop_words=False, ascii_folding=False
            ),
            "numbers": BTree,
            "labels": LabelList,
            "names": Bitmap,
            # Fewer partitions and rounds than by default: minutes become seconds.
            "vectors": lambda: IvfPq(
                distance_type="cosine", num_partitions=256, max_iterations=20, sample_rate=64
            ),
        }  # fmt: skip
        table.create_index(column, config=made[kind]())

    def vector_tables(self) -> list[str]:
        """Names of the tables of decoder rows, one of each width."""
        return sorted(n for n in self._names() if n.startswith("vectors_"))

    def _names(self) -> list[str]:
        return [f.name.removesuffix(".lance") for f in self.folder.glob("*.lance")]

    def _own(self, name: str, run: str, columns: Sequence[str] | None = None) -> "pa.Table":
        return self.rows(name, f"run = {quoted(run)}", columns)

    def _merge(self, name: str, rows: list[dict[str, Any]], *, update: bool = True) -> None:
        import pyarrow as pa

        from ._tables import TABLES

        rows = list({row["key"]: row for row in rows}.values())
        if not rows:
            return
        merge = self.table(name).merge_insert("key")
        if update:
            merge = merge.when_matched_update_all()
        merge.when_not_matched_insert_all().execute(pa.Table.from_pylist(rows, TABLES[name]))


def in_order(contexts: "pa.Table") -> list[dict[str, Any]]:
    """Rows of contexts by feature, group and rank."""
    from ._contexts import GROUPS

    place = {group: i for i, group in enumerate(GROUPS)}
    rows = contexts.drop_columns(["run"]).to_pylist()
    return sorted(rows, key=lambda r: (r["feature"], place.get(r["group"], 99), r["rank"]))


def quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _which(address: str | None, feature: int | None) -> str:
    parts = [] if address is None else [f"dictionary = {quoted(address)}"]
    if feature is not None:
        parts.append(f"feature = {int(feature)}")
    return " AND ".join(parts) or "true"


def _strange(folder: Path) -> bool:
    """Whether there is anything but what an interrupted beginning leaves."""
    from ._tables import TABLES

    known = {f"{name}.lance" for name in TABLES} | {"activations", "texts"}
    return any(f.name not in known for f in folder.iterdir())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
