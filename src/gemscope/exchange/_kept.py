"""What others measured of features, kept in tables of its own beside what the store measured.

Statistics and examples of Neuronpedia and SAEDashboard come from other text and other bins: they
never stand for the store's own. `imported_features` has a row a feature and origin,
`imported_contexts` a row an example.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemscope.features import Store

from ._files import clean, dump, finite, map_text
from ._labels import Label

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

_BATCH = 4096
_TABLES = {"features": "imported_features", "activations": "imported_contexts"}
_KEYS = ("modelId", "layer", "index", "feature_index", "activations", "id", "creatorId")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of a file: of `features` or `activations`, and the feature it is of."""

    kind: str
    label: Label
    row: Mapping[str, Any]
    """With the names of Neuronpedia's fields."""


def imported_features(store: Store, address: str) -> "pa.Table":
    """What others measured of the features of a dictionary: density, maximum, logits, relations,
    histograms as `{value, height}`; `more` is what else the file had, as JSON.
    """
    return _read(store, "features", address, None)


def imported_contexts(store: Store, address: str, feature: int | None = None) -> "pa.Table":
    """Others' examples of a dictionary or of one feature: tokens as text, a value for each, and the
    borders and share of the interval they are from (`low` -1: the strongest).
    """
    return _read(store, "activations", address, feature)


def keep(store: Store, rows: Iterable[tuple[str, int, Measurement]], origin: str) -> dict[str, int]:
    """Keep measurements of features of the store, each with its address; the rows by kind.

    A row that is there already is replaced, so keeping them twice changes nothing.
    """
    counts = dict.fromkeys(_TABLES, 0)
    seen: dict[tuple[str, int], int] = {}
    stream = iter(rows)
    while batch := list(islice(stream, _BATCH)):
        for kind, table in _TABLES.items():
            made = [
                _row(address, feature, one, origin, seen)
                for address, feature, one in batch
                if one.kind == kind
            ]
            if made:
                _write(store, table, kind, made)
                counts[kind] += len(made)
    return counts


def batch_rows(batch: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows that a feature of SAEDashboard stands for, with Neuronpedia's names."""
    yield "features", batch
    names = {"bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains"}
    for one in batch.get("activations") or []:
        yield "activations", {names.get(key, key): value for key, value in one.items()}


def _read(store: Store, kind: str, address: str, feature: int | None) -> "pa.Table":
    store.dictionary(address)
    if feature is not None:
        store.check_feature(address, feature)
    store.table_of(_TABLES[kind], _schemas()[kind])
    name = address.replace("'", "''")
    where = f"dictionary = '{name}'" + ("" if feature is None else f" AND feature = {int(feature)}")
    found = store.rows(_TABLES[kind], where).drop_columns(["key"])
    order = [("feature", "ascending"), ("origin", "ascending")]
    return found.sort_by([*order, *([("number", "ascending")] if kind == "activations" else [])])


def _write(store: Store, table: str, kind: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    schema = _schemas()[kind]
    once = list({row["key"]: row for row in rows}.values())
    merge = store.table_of(table, schema).merge_insert("key")
    merge.when_matched_update_all().when_not_matched_insert_all().execute(
        pa.Table.from_pylist(once, schema)
    )


def _row(
    address: str, feature: int, one: Measurement, origin: str, seen: dict[tuple[str, int], int]
) -> dict[str, Any]:
    row = finite(one.row)
    number = 0
    if one.kind == "activations":
        number = seen[address, feature] = seen.get((address, feature), -1) + 1
    parts = "\0".join((one.kind, address, str(feature), origin, str(number)))
    made = {
        "key": hashlib.sha256(parts.encode()).hexdigest()[:32],
        "dictionary": address,
        "feature": feature,
        "origin": origin,
    }
    if one.kind == "activations":
        return made | _context(row) | {"number": number}
    return made | _feature(row, feature - one.label.feature)


def _feature(row: Mapping[str, Any], first: int) -> dict[str, Any]:
    """`first` is the number of the first feature of its source."""
    used = {"frac_nonzero": "density", "maxActApprox": "max"}
    pairs = {
        "promoted": ("token", "value", "pos_str", "pos_values"),
        "suppressed": ("token", "value", "neg_str", "neg_values"),
        "together": ("feature", "pearson", "correlated_features_indices",
                     "correlated_features_pearson"),
        "neighbours": ("feature", "cosine", "topkCosSimIndices", "topkCosSimValues"),
        "histogram": ("value", "height", "freq_hist_data_bar_values",
                      "freq_hist_data_bar_heights"),
        "logit_histogram": ("value", "height", "logits_hist_data_bar_values",
                            "logits_hist_data_bar_heights"),
    }  # fmt: skip
    made: dict[str, Any] = {name: row.get(field) for field, name in used.items()}
    taken = {*used, *_KEYS}
    for name, (key, second, one, other) in pairs.items():
        both = zip(row.get(one) or [], row.get(other) or [], strict=False)
        made[name] = [{key: _changed(key, a, first), second: b} for a, b in both]
        taken |= {one, other}
    more = {k: v for k, v in row.items() if k not in taken and v not in (None, "", [])}
    return made | {"more": dump(map_text(more, clean))}


def _changed(key: str, value: Any, first: int) -> Any:
    if key == "token":
        return clean(str(value))
    return value + first if key == "feature" else value


def _context(row: Mapping[str, Any]) -> dict[str, Any]:
    values = [0.0 if v is None else float(v) for v in row["values"]]
    used = ("tokens", "values", "binMin", "binMax", "binContains", "dataSource", "dataIndex")
    more = {
        k: v
        for k, v in row.items()
        if k not in (*used, *_KEYS) and v not in (None, "", [])
    }  # fmt: skip
    return {
        "low": row.get("binMin"),
        "high": row.get("binMax"),
        "share": row.get("binContains"),
        "tokens": [clean(token) for token in row["tokens"]],
        "values": values,
        "source": clean(str(row.get("dataSource") or "")),
        "place": clean(str(row.get("dataIndex") or "")),
        "more": dump(map_text(more, clean)),
    }


def _schemas() -> "dict[str, pa.Schema]":
    import pyarrow as pa

    def pairs(first: str, kind: "pa.DataType", second: str) -> "pa.DataType":
        return pa.list_(pa.struct([(first, kind), (second, pa.float64())]))

    keys = [("key", pa.string()), ("dictionary", pa.string()), ("feature", pa.int32()),
            ("origin", pa.string())]  # fmt: skip
    return {
        "features": pa.schema([
            *keys, ("density", pa.float64()), ("max", pa.float64()),
            ("promoted", pairs("token", pa.string(), "value")),
            ("suppressed", pairs("token", pa.string(), "value")),
            ("together", pairs("feature", pa.int64(), "pearson")),
            ("neighbours", pairs("feature", pa.int64(), "cosine")),
            ("histogram", pairs("value", pa.float64(), "height")),
            ("logit_histogram", pairs("value", pa.float64(), "height")),
            ("more", pa.string()),
        ]),
        "activations": pa.schema([
            *keys, ("number", pa.int32()), ("low", pa.float64()), ("high", pa.float64()),
            ("share", pa.float64()), ("tokens", pa.list_(pa.string())),
            ("values", pa.list_(pa.float64())), ("source", pa.string()), ("place", pa.string()),
            ("more", pa.string()),
        ]),
    }  # fmt: skip
