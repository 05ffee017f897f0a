"""Steering as the page asks for it: its settings, what is known of a feature, the record."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemscope import hub
from gemscope.errors import InputError
from gemscope.features import Among, Found, Store, described, search

from ._workbench import Workbench
from ._worker import Cancelled

if TYPE_CHECKING:
    from gemscope.lm import LanguageModel
    from gemscope.steering import Change

Put = Callable[[dict[str, Any]], None]
_FOUND = 12
"""Features that a search offers."""
_POINTS, _PROMPTS = 12, 16
"""Strengths and prompts of a dose curve, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an address asks for; `modes`, `strengths` and `positions` once, or once a feature."""

    prompt: str
    features: tuple[str, ...]
    modes: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    seed: int = 0
    max_new_tokens: int = 40
    temperature: float = 0.0
    chat: bool = False

    def rows(self) -> list[tuple[str, str, str | None, str]]:
        """Feature, mode, strength and positions of each edit."""
        n = len(self.features)
        strengths = [s or None for s in _spread("strength", self.strengths, n, "")]
        return list(
            zip(
                self.features, _spread("mode", self.modes, n, "add"), strengths,
                _spread("positions", self.positions, n, "all"), strict=True,
            )
        )  # fmt: skip

    def restored(self) -> list[tuple[str, str, str, str]]:
        """The same as a page shows it: what is missing is made up for, nothing is refused."""
        n = len(self.features)

        def padded(given: Sequence[str], other: str) -> list[str]:
            many = list(given) * n if len(given) == 1 else list(given)
            return [*many[:n], *[other] * (n - len(many))]

        return list(
            zip(self.features, padded(self.modes, "add"), padded(self.strengths, "1xmax"),
                padded(self.positions, "all"), strict=True)
        )  # fmt: skip


def _spread(name: str, given: Sequence[str], n: int, other: str) -> list[str]:
    if len(given) not in (0, 1, n):
        raise InputError(
            f"{len(given)} times {name} for {n} features; give it once, or once for each"
        )
    return list(given) if len(given) == n else list(given or (other,)) * n


def known_of(bench: Workbench, name: str) -> dict[str, Any]:
    """What the row of a feature shows: its maximum, how dense it is, what it is said to be."""
    from gemscope.steering import maximum_of

    address, index = hub.feature_of(name)
    facts = bench.facts(address)
    if index >= facts["d_sae"]:
        raise InputError(f"no feature {index}: {address} has 0 to {facts['d_sae'] - 1}")
    out: dict[str, Any] = {
        "name": f"{address}/{index}", "address": address, "feature": index,
        "indexed": facts["indexed"], "density": None, "output_score": None, "explanation": None,
        "score": None,
    }  # fmt: skip
    if not facts["indexed"]:
        return out | {"maximum": maximum_of(address, index, None)}
    store = bench.store_of(address)
    row = store.feature(address, index)
    text, score = described(store, [(address, index)]).get((address, index), (None, None))
    return out | {
        "output_score": _number(row.get("output_score")), "maximum": float(row["max"]),
        "density": row["density"], "explanation": text, "score": score,
    }  # fmt: skip


def find(bench: Workbench, query: str, address: str) -> list[dict[str, Any]]:
    """Features to add: ADDRESS/INDEX, a number in `address`, or words."""
    asked = query.strip()
    if not asked:
        return []
    if asked.isdecimal() and address:
        return [known_of(bench, f"{address}/{asked}")]
    if "/" in asked and asked.rpartition("/")[2].isdecimal():
        return [known_of(bench, asked)]
    if not bench.known():
        raise InputError(
            "no dictionary is indexed, so there are no words to search; write a feature as "
            "ADDRESS/INDEX"
        )
    found = [
        (f.score, one)
        for store in bench.stores if store.dictionaries()
        for f, one in _matches(store, asked)
    ]  # fmt: skip
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])[:_FOUND]]


def _matches(store: Store, words: str) -> list[tuple[Found, dict[str, Any]]]:
    """What a search of a store finds, with output scores: which features will steer well."""
    found = search(store, words, Among(limit=_FOUND))
    if not found:
        return []
    # By number, which an index knows; of other dictionaries those are left out again.
    numbers = ", ".join(sorted({str(f.feature) for f in found}))
    columns = ["run", "feature", "output_score"]
    rows = store.rows("features", f"feature IN ({numbers})", columns).to_pylist()
    scores = {(r["run"], r["feature"]): r["output_score"] for r in rows}
    return [
        (f, {
            "name": f"{f.address}/{f.feature}", "address": f.address, "feature": f.feature,
            "density": f.density, "explanation": f.explanation,
            "output_score": _number(scores.get((store.dictionary(f.address)["run"], f.feature))),
        })
        for f in found
    ]  # fmt: skip


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def store_for(bench: Workbench, address: str) -> Store | None:
    """The store that knows a dictionary's maxima; none of one that is only bundled."""
    return bench.store_of(address) if bench.facts(address)["indexed"] else None


def changes_of(bench: Workbench, asked: Asked) -> "list[Change]":
    """The edits, checked."""
    from gemscope import steering

    if not asked.features:
        raise InputError("nothing to steer with; add a feature")
    if len(asked.features) > bench.limits.edits:
        raise InputError(
            f"{len(asked.features)} features were given, and {bench.limits.edits} are steered at "
            "once; take some out"
        )
    out = []
    for name, mode, strength, positions in asked.rows():
        address, _ = hub.feature_of(name)
        store = store_for(bench, address)
        known = {address: bench.dictionary(address)}
        out.append(
            steering.change_of(name, mode, strength, positions=positions, store=store, known=known)
        )
    return out


def steered(bench: Workbench, asked: Asked, stop: threading.Event, put: Put) -> None:
    """Hand on the text as it comes, then the record of `gemscope steer --json`.

    Ends at the next token once nobody waits for it.
    """
    from gemscope import steering

    bench.limits.check_text(asked.prompt)
    most = bench.limits.new_tokens
    if asked.max_new_tokens > most:
        raise InputError(
            f"{asked.max_new_tokens} new tokens were asked for, and {most} are generated at once; "
            "ask for fewer"
        )
    changes = changes_of(bench, asked)
    model = bench.model_of([hub.feature_of(f)[0] for f in asked.features])
    done = steering.steer(
        asked.prompt, changes, model=model, max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature, seed=asked.seed, chat=asked.chat,
        heard=_streamed(model, stop, put),
    )  # fmt: skip
    put({"done": done.json()})


def _streamed(
    model: "LanguageModel", stop: threading.Event, put: Put
) -> Callable[[str, list[int | None]], None]:
    """Hands on each piece of text as soon as its characters are whole."""
    so_far: dict[str, list[int]] = {}
    told: dict[str, str] = {}

    def heard(what: str, tokens: list[int | None]) -> None:
        if stop.is_set():
            raise Cancelled
        if tokens[0] is None:
            return
        ids = so_far.setdefault(what, [])
        ids.append(tokens[0])
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        if new := text.removeprefix(told.get(what, "")):
            put({"what": what, "text": new})
        told[what] = text

    return heard


def response(
    bench: Workbench, name: str, mode: str, strengths: Sequence[str], positions: str,
    stop: threading.Event, prompts: Sequence[str] = (), **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A feature's dose curve: the record of `gemscope dose --json`, and sizes to draw it by."""
    from gemscope import steering

    if len(strengths) > _POINTS or len(prompts) > _PROMPTS:
        raise InputError(
            f"a curve here has at most {_POINTS} strengths and {_PROMPTS} prompts; gemscope dose "
            "takes more"
        )
    for prompt in prompts:
        bench.limits.check_text(prompt)
    if settings["max_new_tokens"] > bench.limits.new_tokens:
        raise InputError(f"at most {bench.limits.new_tokens} new tokens are generated at once")
    address, _ = hub.feature_of(name)
    known = {address: bench.dictionary(address)}
    feature = steering.load_feature(name, store=store_for(bench, address), known=known)
    model = bench.model_of([address])
    model.check(feature.sae)

    def progress(_what: str, _done: int, _of: int) -> None:
        if stop.is_set():
            raise Cancelled

    found = steering.dose(
        model, feature, list(prompts) or steering.neutral_prompts(model),
        [steering.Strength.parse(s) for s in strengths], mode=steering.Mode.parse(mode),
        positions=steering.Positions.parse(positions), progress=progress, **settings,
    )  # fmt: skip
    return found.json() | {"sizes": found.sizes()}
