"""Finding features in a catalog store, without a model: by words, promoted tokens, direction."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemscope.errors import InputError

from ._pieces import bare
from ._records import Explanation, Note
from ._store import Store, quoted

_WEIGHTS = {"notes": 3.0, "explanations": 2.0, "features": 1.0}
"""What a match counts: what people wrote before what methods found, and tokens last."""

_EXACT = 2
"""Dictionaries in which directions are compared one by one."""
_STATISTICS = (
    "feature", "layer", "count", "density", "mean", "mean_active", "max", "first_share",
    "documents", "threshold", "bias", "encoder_norm", "decoder_norm", "encoder_decoder_cosine",
    "logit_mean", "logit_std", "logit_skew", "logit_kurtosis",
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
    columns = ["dictionary", "feature", "promoted", "logit_mean", "logit_std"]
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
    return _best(store, scores, among, runs, matched=matched)


def search_like(store: Store, address: str, feature: int, among: Among = Among()) -> list[Found]:
    """Features whose decoder direction is nearest to that of one feature; scores are cosines."""
    known = store.dictionary(address)
    store.check_feature(address, feature)
    table = store.table(f"vectors_{known['d_out']}")
    own = f"run = {quoted(known['run'])} AND feature = {feature}"
    vector = store.rows(f"vectors_{known['d_out']}", own, ["vector"])["vector"][0].as_py()
    runs = _runs(store, among)
    # Conditions on statistics are of another table: look further, and keep what satisfies them.
    wide = (among.limit + 1) * (20 if among.where else 1)
    query = table.search(vector).distance_type("cosine").limit(wide)
    query = query.select(["run", "dictionary", "feature", "_distance"])
    if among.addresses:
        query = query.where(_in("run", runs.values()), prefilter=True)
    # In few dictionaries all rows are compared; among very many an index finds candidates first.
    exact = among.addresses and len(among.addresses) <= _EXACT
    query = query.bypass_vector_index() if exact else query.nprobes(40).refine_factor(10)
    found = _in_force(_told(query.to_list), runs)
    scores = {(r["dictionary"], r["feature"]): 1.0 - r["_distance"] for r in found}
    scores.pop((address, feature), None)
    return _best(store, scores, among, runs)


def search_where(store: Store, among: Among) -> list[Found]:
    """Features by their statistics alone, the densest first; scores are densities."""
    runs = _runs(store, among)
    where = among.where or "true"
    columns = ["run", "dictionary", "feature", "density"]
    if among.addresses:
        where = f"({where}) AND {_in('run', runs.values())}"
    table = _told(lambda: store.rows("features", where, columns))
    # A wide condition lets through most of a store: sorted as columns, of which few become rows.
    table = table.sort_by([("density", "descending"), ("dictionary", "ascending")])
    found: list[dict[str, Any]] = []
    for batch in table.to_batches(max_chunksize=4 * among.limit):
        found += _in_force(batch.to_pylist(), runs)
        if len(found) >= among.limit:
            break
    scores = {(r["dictionary"], r["feature"]): r["density"] for r in found}
    return _best(store, scores, among, runs)


def described(
    store: Store, features: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, float | None]]:
    """What each of some features is called, with the score: a note before any explanation."""
    wanted = list(features)
    if not wanted:
        return {}
    where, asked = _numbers(wanted), set(wanted)
    out: dict[tuple[str, int], tuple[str, float | None]] = {}
    rows = store.rows("explanations", where).to_pylist()
    explanations = [Explanation.of(row) for row in rows]
    for e in sorted(explanations, key=lambda e: (e.score or 0.0, e.created)):
        if (e.dictionary, e.feature) not in asked:
            continue
        out[e.dictionary, e.feature] = (e.text, e.score)
    notes = [Note.of(row) for row in store.rows("notes", where).to_pylist()]
    for n in sorted(notes, key=lambda n: n.created):
        if (n.dictionary, n.feature) not in asked:
            continue
        out[n.dictionary, n.feature] = (n.text, n.confidence)
    return out


def _full_text(
    store: Store, name: str, column: str, query: str, among: Among, runs: dict[str, str]
) -> list[tuple[str, int, float]]:
    table = store.table(name)
    if not table.count_rows():
        return []
    of_run = name == "features"
    asked = table.search(query, query_type="fts", fts_columns=column)
    asked = asked.limit(among.limit * (20 if among.where else 4))
    asked = asked.select([*(["run"] if of_run else []), "dictionary", "feature", "_score"])
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
) -> list[Found]:
    order = sorted(scores, key=lambda key: (-scores[key], key))
    if among.where is None:
        order = order[: among.limit]
    if not order:
        return []
    columns = ["dictionary", "feature", "density", "max"]
    rows = _select(store, runs, among, columns, _numbers(order))
    known = {(r["dictionary"], r["feature"]): r for r in rows}
    kept = [key for key in order if key in known][: among.limit]
    said = described(store, kept)
    out = []
    for key in kept:
        text, value = said.get(key, (None, None))
        out.append(
            Found(
                address=key[0], feature=key[1], score=float(scores[key]),
                density=known[key]["density"], max=known[key]["max"], explanation=text,
                explanation_score=value, matched=(matched or {}).get(key, {}),
            )
        )  # fmt: skip
    return out


def _runs(store: Store, among: Among) -> dict[str, str]:
    """The run in force of each dictionary that is looked through."""
    for address in among.addresses:
        store.dictionary(address)
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
    return [r for r in rows if runs.get(r["dictionary"]) == r.get("run", runs.get(r["dictionary"]))
            and r["dictionary"] in runs]  # fmt: skip


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
