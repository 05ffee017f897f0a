"""Output scores in the store: which features have none yet, and those that were measured.

Beside a dictionary's facts stands how its scores were measured, so that scores of one column are
never of two kinds.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemscope.errors import InputError

from ._store import Store, quoted

HOW = "output_scores"
"""Key of a dictionary's facts under which it says how its output scores were measured."""


def begin_output_scores(
    store: Store, address: str, how: Mapping[str, Any], *, again: bool = False
) -> list[int]:
    """The features of a dictionary that fire and have no output score yet; all `again` if asked.

    From here on the dictionary says that its scores are measured as `how` says. Scores that were
    measured otherwise are refused, or removed to be measured again.
    """
    known = store.dictionary(address)
    before, wanted = known.get(HOW), json.loads(json.dumps(dict(how)))
    if before not in (None, wanted) and not again:
        differ = sorted(n for n in {*before, *wanted} if before.get(n) != wanted.get(n))
        raise InputError(
            f"{address} has output scores measured with other {', '.join(differ)}; take the same, "
            "or measure all of them again with --force"
        )
    rows = store.features(address, ["max", "output_score"])
    if again:
        measured = rows.filter(rows["output_score"].is_valid())["feature"].to_pylist()
        write_output_scores(store, address, known["run"], measured, [None] * len(measured))
        rows = store.features(address, ["max", "output_score"])
    if before != wanted:
        _say(store, address, known["run"], wanted)
    left = rows["output_score"].is_null().to_numpy(zero_copy_only=False)
    fires = rows["max"].to_numpy() > 0
    return rows["feature"].to_numpy()[left & fires].tolist()


def write_output_scores(
    store: Store, address: str, run: str, features: Sequence[int], scores: Sequence[float | None]
) -> None:
    """Write the scores of some features of one run; those that are no numbers become null.

    If another run is in force by now, its rows stay as they are. Indices that searching uses are
    behind until `Store.refresh`.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    if not len(features):
        return
    values = [None if v is None or not np.isfinite(v) else float(v) for v in scores]
    rows = pa.table(
        {
            "run": [run] * len(values),
            "feature": pa.array(list(features), pa.int32()),
            "output_score": pa.array(values, pa.float64()),
        }
    )
    merge = store.table("features").merge_insert(["run", "feature"])
    merge.when_matched_update_all().execute(rows)


def _say(store: Store, address: str, run: str, how: Mapping[str, Any]) -> None:
    """Put `how` into the facts of a dictionary, of which another run may be in force by now."""
    table = store.table("dictionaries")
    where = f"address = {quoted(address)} AND run = {quoted(run)}"
    for row in table.search().where(where).limit(1).to_list():
        facts = json.dumps(json.loads(row["facts"]) | {HOW: how})
        table.update(where=where, values={"facts": facts})
