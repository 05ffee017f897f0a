"""Finding features in a catalog store, without a model: by words, promoted tokens, direction."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemscope.errors import InputError

from ._pieces import bare
from ._store import Store, quoted

_WEIGHTS = {"notes": 3.0, "explanations": 2.0, "features": 1.0}
"""What a match counts: what people wrote before what methods found, and tokens last."""

_EXACT = 2
"""Dictionaries in which directions are compared one by one."""
_STATISTICS = (
    "feature", "layer", "count", "density", "mean", "mean_active", "max", "first_share",
    "documents", "threshold", "bias", "encoder_norm", "decoder_norm", "encoder_decoder_cosine",
    "logit_mean", "logit_std", "logit_skew", "logit_kurtosis", "output_score",
)  # fmt: skip
"""Columns that a condition may be on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A feature that a search found."""

    address: str
    feature: int
    score: float
    """How well it matches, in units of the kind of search; best first."""
    density: float
    max: float
    explanation: str | None = None
    """A person's note if there is one, otherwise the best scored explanation."""
    explanation_score: float | None = None
    matched: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """What `gemscope search --json` says of it."""
        return {
            "address": self.address, "feature": self.feature, "explanation": self.explanation,
            "score": self.score, "density": self.density, "max": self.max,
            "explanation_score": self.explanation_score, **self.matched,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Among:
    """Which features a search looks through."""

    addresses: tuple[str, ...] = ()
    """Dictionaries; all of them if none are named."""
    where: str | None = None
    """A condition on statistics in SQL, such as `density < 0.01 AND max > 5`."""
    limit: int = 20

    def __post_init__(self):
        if self.limit < 1:
            raise InputError(f"a limit of {self.limit} shows nothing; take 1 or more")


def search(store: Store, query: str, among: Among = Among()) -> list[Found]:
    """Features by full text over notes, explanations, and tokens they fire on or promote."""
    if not query.strip():
        raise InputError("the query is empty; give words to look for")
    runs = _runs(store, among)
    scores: dict[tuple[str, int], float] = {}
    for name, column in (("notes", "text"), ("explanations", "text"), ("features", "words")):
        for address, feature, score in _full_text(store, name, column, query, among, runs):
            key = (address, feature)
            scores[key] = scores.get(key, 0.0) + _WEIGHTS[name] * score
    return _best(store, scores, among, runs)


def search_promotes(store: Store, token: str, among: Among = Among()) -> list[Found]:
    """Features among whose promoted tokens `token` is, with or without a space before it.

    The score is the token's direct logit in standard deviations of the feature's logits.
    """
    if not token:
        raise InputError("the token is empty; give one such as return")
    runs = _runs(store, among)
    wanted = bare(token)
    columns = ["feature", "promoted", "logit_mean", "logit_std"]
    where = f"array_has_any(promotes, [{quoted(wanted)}])"
    rows = _select(store, runs, among, columns, where)
    scores, matched = {}, {}
    for row in rows:
        best = max(
            (t for t in row["promoted"] if bare(t["token"]) == wanted), key=lambda t: t["logit"]
        )
        key = (row["dictionary"], row["feature"])
        scores[key] = (best["logit"] - row["logit_mean"]) / max(row["logit_std"], 1e-30)
        matched[key] = {"promotes": best["token"], "logit": best["logit"]}
    return _best(store, scores, among, runs, matched=matched, satisfied=True)


def search_like(store: Store, address: str, feature: int, among: Among = Among()) -> list[Found]:
    """Features whose decoder direction is nearest to that of one feature; scores are cosines."""
    known = store.dictionary(address)
    store.check_feature(address, feature)
    name = f"vectors_{known['d_out']}"
    own = f"run = {quoted(known['run'])} AND feature = {feature}"
    vector = store.rows(name, own, ["vector"])["vector"].combine_chunks().flatten().to_numpy()
    runs = _runs(store, among)
    # Conditions on statistics are of another table: look further, and keep what satisfies them.
    wide = (among.limit + 1) * (20 if among.where else 1)
    if len(among.addresses) == 1:
        scores = _nearest(store, among.addresses[0], vector, wide)
    else:
        query = store.table(name).search(vector).distance_type("cosine").limit(wide)
        query = query.select(["run", "feature", "_distance"])
        if among.addresses:
            query = query.where(_in("run", runs.values()), prefilter=True)
        # In few dictionaries all rows are compared; among many an index finds candidates first.
        exact = among.addresses and len(among.addresses) <= _EXACT
        query = query.bypass_vector_index() if exact else query.nprobes(10).refine_factor(5)
        found = _in_force(_told(query.to_list), runs)
        scores = {(r["dictionary"], r["feature"]): 1.0 - r["_distance"] for r in found}
    scores.pop((address, feature), None)
    return _best(store, scores, among, runs)


def _nearest(
    store: Store, address: str, vector: np.ndarray, limit: int
) -> dict[tuple[str, int], float]:
    """Cosines of the directions of one dictionary nearest to `vector`, all of them compared."""
    if store.dictionary(address)["d_out"] != len(vector):
        return {}
    cosines = store.directions(address) @ (vector / max(float(np.linalg.norm(vector)), 1e-30))
    limit = min(limit, len(cosines))
    best = np.argpartition(-cosines, limit - 1)[:limit]
    return {(address, int(feature)): float(cosines[feature]) for feature in best}


def search_where(store: Store, among: Among) -> list[Found]:
    """Features by their statistics alone, the densest first; scores are densities."""
    runs = _runs(store, among)
    where = among.where or "true"
    columns = ["run", "feature", "density"]
    if among.addresses:
        where = f"({where}) AND {_in('run', runs.values())}"
    order = [
        {"column_name": name, "ascending": name != "density"} for name in ("density", "feature")
    ]
    asked, wide = store.table("features").search().where(where).select(columns), 4 * among.limit
    while True:
        rows = _told(asked.order_by(order).limit(wide).to_list)
        found = _in_force(rows, runs)[: among.limit]
        # Rows of other runs or dictionaries may stand before: then further down.
        if len(found) == among.limit or len(rows) < wide:
            break
        wide *= 8
    scores = {(r["dictionary"], r["feature"]): r["density"] for r in found}
    return _best(store, scores, among, runs, satisfied=True)


def described(
    store: Store, features: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, float | None]]:
    """What each of some features is called, with the score: a note before any explanation."""
    wanted = list(features)
    if not wanted:
        return {}
    out: dict[tuple[str, int], tuple[str, float | None]] = {}
    explanations = _said(store, "explanations", "score", wanted)
    for r in sorted(explanations, key=lambda r: (r["score"] or 0.0, r["created"])):
        out[r["dictionary"], r["feature"]] = (r["text"], r["score"])
    notes = _said(store, "notes", "confidence", wanted)
    for r in sorted(notes, key=lambda r: r["created"]):
        out[r["dictionary"], r["feature"]] = (r["text"], r["confidence"])
    return out


def _said(
    store: Store, name: str, score: str, features: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Rows of a table of texts about features: found by numbers, which are other dictionaries'
    too, and only those asked for read in full.
    """
    table, asked = store.table(name), set(features)
    if not table.count_rows():
        return []
    found = table.search().where(_numbers(features)).select(["dictionary", "feature"])
    rows = found.with_row_id(True).limit(2**31 - 1).to_list()
    ids = [r["_rowid"] for r in rows if (r["dictionary"], r["feature"]) in asked]
    if not ids:
        return []
    columns = ["dictionary", "feature", "text", score, "created"]
    return table.take_row_ids(ids).select(columns).to_list()


def _full_text(
    store: Store, name: str, column: str, query: str, among: Among, runs: dict[str, str]
) -> list[tuple[str, int, float]]:
    table = store.table(name)
    if not table.count_rows():
        return []
    of_run = name == "features"
    asked = table.search(query, query_type="fts", fts_columns=column)
    asked = asked.limit(among.limit * (20 if among.where else 4))
    asked = asked.select(["run" if of_run else "dictionary", "feature", "_score"])
    if among.addresses:
        where = _in("run", runs.values()) if of_run else _in("dictionary", runs)
        asked = asked.where(where, prefilter=True)
    found = _in_force(_told(asked.to_list), runs)
    return [(r["dictionary"], r["feature"], r["_score"]) for r in found]


def _best(
    store: Store,
    scores: dict[tuple[str, int], float],
    among: Among,
    runs: dict[str, str],
    *,
    matched: dict[tuple[str, int], dict] | None = None,
    satisfied: bool = False,
) -> list[Found]:
    """The best of what was found; `satisfied` says that all of it meets the conditions."""
    order = sorted(scores, key=lambda key: (-scores[key], key))
    if among.where is None:
        order = order[: among.limit]
    if not order:
        return []
    if among.where is not None and not satisfied:
        rows = _select(store, runs, among, ["feature"], _numbers(order))
        passed = {(r["dictionary"], r["feature"]) for r in rows}
        order = [key for key in order if key in passed]
    kept = order[: among.limit]
    said, figures = described(store, kept), store.figures()
    out = []
    for key in kept:
        text, value = said.get(key, (None, None))
        density, highest = figures[key[0]][key[1]]
        out.append(
            Found(
                address=key[0], feature=key[1], score=float(scores[key]),
                density=float(density), max=float(highest), explanation=text,
                explanation_score=value, matched=(matched or {}).get(key, {}),
            )
        )  # fmt: skip
    return out


def _runs(store: Store, among: Among) -> dict[str, str]:
    """The run in force of each dictionary that is looked through."""
    for address in among.addresses:
        store.dictionary(address)
    # A condition on what nobody has measured is satisfied by nothing; that says too little.
    asked = re.search(r"\boutput_score\b(?!\s+is\b)", among.where or "", re.IGNORECASE)
    if asked and not store.table("features").count_rows("output_score IS NOT NULL"):
        raise InputError(
            f"no output score in {store.folder} has been measured yet; gemscope output-score "
            f"{store.folder} does"
        )
    known = {d["address"]: d["run"] for d in store.dictionaries()}
    chosen = {a: r for a, r in known.items() if not among.addresses or a in among.addresses}
    if not chosen:
        raise InputError(f"{store.folder} holds no dictionary yet; gemscope index adds one")
    return chosen


def _select(
    store: Store, runs: dict[str, str], among: Among, columns: Sequence[str], *more: str
) -> list[dict[str, Any]]:
    """Rows in force of the features looked through that satisfy the conditions."""
    parts = [*more, *([f"({among.where})"] if among.where else [])]
    if among.addresses or not parts:
        parts.append(_in("run", runs.values()))
    where = " AND ".join(parts)
    found = _told(lambda: store.rows("features", where, ["run", *columns]).to_pylist())
    return _in_force(found, runs)


def _in_force(rows: list[dict[str, Any]], runs: dict[str, str]) -> list[dict[str, Any]]:
    """Without rows of dictionaries not looked through, or of runs not in force.

    Sorting these few out here is quicker than asking for the others: a condition on names is
    looked at for every row of the store.
    """
    names = {run: address for address, run in runs.items()}
    if rows and "run" in rows[0]:
        return [r | {"dictionary": names[r["run"]]} for r in rows if r["run"] in names]
    return [r for r in rows if r["dictionary"] in runs]


def _in(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(map(quoted, values))})"


def _numbers(features: Iterable[tuple[str, int]]) -> str:
    """A condition that an index answers: that the number is one of some features'."""
    return f"feature IN ({', '.join(map(str, sorted({f for _, f in features})))})"


def _told(query: Callable[[], Any]) -> Any:
    """The result of a query; a condition that cannot be understood in a sentence."""
    try:
        return query()
    except (ValueError, RuntimeError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if unknown := re.search(r"No field named (\S+?)\.?(?: |$)", first):
            raise InputError(
                f"no statistic named {unknown[1]}; there are {', '.join(_STATISTICS)}"
            ) from None
        raise InputError(
            f"the store does not understand this: {first[:200]}; conditions are SQL on statistics, "
            "such as density < 0.01 AND max > 5"
        ) from None
