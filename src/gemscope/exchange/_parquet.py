"""A store's rows as Parquet files, and labels back from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gemscope.errors import InputError

from ._catalog import refuse
from ._files import MARK, dump, finite, new_folder
from ._labels import (
    Incoming,
    Label,
    PlainExplanation,
    PlainNote,
    Problem,
    explanation_of,
    note_of,
    plain_explanation,
    plain_note,
    problems_of,
)
from ._measured import Measured, Progress

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

LOST = ("the whole text and kept activations", "decoder vectors, unless --vectors is given")
_LARGEST = 2**31
_OWN = ("run", "words")
"""Columns that serve the store alone."""


def write_parquet(
    target: Path,
    measured: Sequence[Measured],
    *,
    vectors: bool = False,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> int:
    """Write `features`, `contexts`, `explanations` and `notes` as `.parquet`; the features."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    done, total = 0, sum(len(one.chosen) for one in measured)
    with new_folder(target, force=force) as folder:
        for name in ("features", "contexts", *(["vectors"] if vectors else [])):
            file = folder / f"{name}.parquet"
            writer: pq.ParquetWriter | None = None
            for one in measured:
                for first in range(0, len(one.chosen), 1024):
                    table = _table(name, one, one.chosen[first : first + 1024])
                    # Vectors of different widths are one column: their length is not fixed.
                    writer = writer or pq.ParquetWriter(file, table.schema)
                    writer.write_table(table.cast(writer.schema))
                    if name == "features":
                        done += table.num_rows
                        progress("writing", done, total)
            assert writer is not None
            writer.close()
        for name, rows in _labels(measured).items():
            pq.write_table(pa.Table.from_pylist(rows, _schemas()[name]), folder / f"{name}.parquet")
        about = [finite(one.dictionary) for one in measured]
        (folder / MARK).write_text(dump({"format": "parquet", "dictionaries": about}), "utf-8")
    return done


def _table(name: str, one: Measured, features: list[int]) -> "pa.Table":
    import pyarrow as pa

    if name == "vectors":
        found = one.store.vectors(one.address)[features]
        return pa.table({
            "dictionary": [one.address] * len(features),
            "feature": pa.array(features, pa.int32()),
            "vector": pa.array(list(found), pa.list_(pa.float32())),
        })  # fmt: skip
    if name == "features":
        table = one.store.features(one.address).take(features)
        return table.drop_columns([c for c in _OWN if c in table.column_names])
    rows = [row for feature in features for row in one.contexts(feature)]
    schema = one.store.table("contexts").schema
    table = pa.Table.from_pylist(rows, schema).drop_columns(["run"])
    tokens = [one.pieces(int(row["context"])) for row in rows]
    return table.append_column("tokens", pa.array(tokens, pa.list_(pa.string())))


def _labels(measured: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"explanations": [], "notes": []}
    for one in measured:
        for feature in one.chosen:
            key = {"dictionary": one.address, "feature": feature}
            for explanation in one.explanations.get(feature, []):
                plain = finite(plain_explanation(explanation))
                texts = {"scores": dump(plain["scores"]), "detail": dump(plain["detail"])}
                found["explanations"].append(key | plain | {"score": explanation.score} | texts)
            for note in one.notes.get(feature, []):
                plain = finite(plain_note(note))
                found["notes"].append(key | plain | {"detail": dump(plain["detail"])})
    return found


def _schemas() -> dict[str, "pa.Schema"]:
    import pyarrow as pa

    key = [("dictionary", pa.string()), ("feature", pa.int32()), ("text", pa.string()),
           ("author", pa.string()), ("created", pa.string()), ("detail", pa.string())]  # fmt: skip
    return {
        "explanations": pa.schema(
            [*key, ("method", pa.string()), ("score", pa.float64()), ("scores", pa.string())]
        ),
        "notes": pa.schema(
            [*key, ("confidence", pa.float64()), ("limitations", pa.list_(pa.string()))]
        ),
    }


def read_parquet(path: Path) -> Incoming:
    """Labels of a folder of Parquet files, or of one file of explanations or notes."""
    found = Incoming(format="parquet")
    files = [path] if path.is_file() else [path / f"{n}.parquet" for n in ("explanations", "notes")]
    for file in files:
        if path.is_file() or file.is_file():
            _read(file, found)
    if path.is_dir() and not any(file.is_file() for file in files):
        raise InputError(f"{path} holds neither explanations.parquet nor notes.parquet")
    for name in ("features", "contexts", "vectors"):
        if path.is_dir() and (path / f"{name}.parquet").is_file():
            found.lost.append(f"{name}.parquet: the store measures its own")
    return found


def checked(path: Path) -> Incoming:
    """Labels; InputError if any row is wrong."""
    found = read_parquet(path)
    refuse(path, found.problems)
    return found


def _read(file: Path, found: Incoming) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            columns = set(opened.schema_arrow.names)
            size = sum(
                opened.metadata.row_group(i).total_byte_size
                for i in range(opened.metadata.num_row_groups)
            )
            if size > _LARGEST:
                raise InputError(f"{file} holds {size:,} bytes when unpacked: too many for labels")
            need = {"dictionary", "feature", "text"}
            if lacking := sorted(need - columns):
                raise InputError(f"{file} has no column {lacking[0]}: it is no file of labels")
            explains = "method" in columns
            numbers = iter(range(2**62))
            for batch in opened.iter_batches(4096):
                for row in batch.to_pylist():
                    label = _label(row, next(numbers), file.name, explains, found.problems)
                    if label is not None:
                        found.labels.append(label)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{file} cannot be read as Parquet: {reason}") from None


def _label(
    row: dict[str, Any], number: int, name: str, explains: bool, problems: list[Problem]
) -> Label | None:
    place = f"{name}, row {number}"
    try:
        feature, dictionary = row["feature"], row["dictionary"]
        if not isinstance(feature, int) or feature < 0 or not isinstance(dictionary, str):
            raise ValueError(f"no feature {feature!r} of {dictionary!r}")
        plain: dict[str, Any] = {"text": row["text"]}
        for key in ("author", "created"):
            plain[key] = row.get(key) or ""
        plain["detail"] = json.loads(row.get("detail") or "{}")
        if explains:
            plain |= {"method": row["method"], "scores": json.loads(row.get("scores") or "[]")}
            read = PlainExplanation.model_validate(plain)
            return Label(
                dictionary=dictionary, feature=feature, place=place,
                explanations=(explanation_of(read, dictionary, feature),),
            )  # fmt: skip
        plain["confidence"] = row.get("confidence")
        plain["limitations"] = row.get("limitations") or []
        note = note_of(PlainNote.model_validate(plain), dictionary, feature)
        return Label(dictionary=dictionary, feature=feature, place=place, notes=(note,))
    except ValidationError as error:
        for problem in problems_of(error, ""):
            problems.append(Problem(f"{place}, {problem.place}", problem.problem))
    except (ValueError, RecursionError) as error:
        problems.append(Problem(place, str(error)))
    return None
