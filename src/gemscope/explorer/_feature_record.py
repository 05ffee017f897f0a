"""The record of one feature: what `gemscope feature` says, and what a page adds to it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Among, Note, card, search_like
from gemscope.relate import Rules, layers_of, wilson
from gemscope.sites import Stream

from ._feature_store import KeptStore

DENSE = 0.1
"""Share of the tokens above which a feature is tagged as dense."""
_NEAREST = 5
_WHOLE = 2**28
"""Bytes of decoder rows up to which all of a layer are compared."""
_SHARED = {
    Stream.RESID_PRE, Stream.RESID_MID, Stream.RESID_POST, Stream.ATTN_OUT, Stream.MLP_OUT,
}  # fmt: skip
"""Streams in which directions of two layers can be compared: they are added to the residual one."""


def record(store: KeptStore, address: str, feature: int) -> dict[str, Any]:
    """The record of a feature, as `features.card` has it, and beside it:

    of `together` how many tokens the other fires on, the shares P(other | this) and
    P(this | other) with 95% intervals, and the relation that follows from them (`parent`, `child`,
    `duplicate` or None); of `notes` their keys, and whether a later note replaces them; `tags`,
    `dead` or `dense`.
    """
    with store.one_look():
        return store.remembered(address, feature, lambda: _record(store, address, feature))


def _record(store: KeptStore, address: str, feature: int) -> dict[str, Any]:
    found = card(store, address, feature, store.described)
    found["notes"] = noted(store, address, feature)
    figures = store.figures()[address]
    tokens = found["dictionary"]["tokens"]
    near = {n["feature"]: n["cosine"] for n in found["neighbours"]}
    for other in found["together"]:
        fired = round(float(figures[other["feature"], 0]) * tokens)
        other |= _relation(other, found["count"], fired, tokens, near)
    found["tags"] = tags(found["count"], found["density"])
    return found


def tags(count: int, density: float) -> list[str]:
    """What has to be said of a feature before anything else."""
    return ["dead"] if not count else ["dense"] if density > DENSE else []


def noted(store: KeptStore, address: str, feature: int) -> list[dict[str, Any]]:
    """Notes, those in force first; what a later one replaces stays, and says so."""
    notes = store.notes(address, feature)
    replaced = {n.detail.get("replaces") for n in notes}
    out = [n.json() | {"key": n.key, "replaced": n.key in replaced} for n in notes]
    return sorted(out, key=lambda n: n["replaced"])


def write_note(store: KeptStore, note: Note) -> None:
    """Keep a note of a feature that is there."""
    store.check_feature(note.dictionary, note.feature)
    store.add_notes([note])


def _relation(
    other: Mapping[str, Any], own: int, fired: int, tokens: int, near: Mapping[int, float],
    rules: Rules = Rules(),
) -> dict[str, Any]:  # fmt: skip
    """How firing of a feature and of another one go together, by the rules of relations."""
    both = other["count"]
    ahead, back = both / max(own, 1), both / max(fired, 1)
    kind = None
    if min(own, fired) >= rules.least:
        if ahead >= rules.within and back <= rules.apart and ahead >= rules.lift * fired / tokens:
            kind = "child"
        elif back >= rules.within and ahead <= rules.apart and back >= rules.lift * own / tokens:
            kind = "parent"
        elif min(ahead, back) >= rules.same and near.get(other["feature"], 0.0) >= rules.alike:
            kind = "duplicate"
    shares = {}
    for name, share, n in (
        ("other_given_this", ahead, own),
        ("this_given_other", back, fired),
    ):
        low, high = wilson(both, max(n, both))
        shares[name] = {"value": share, "low": low, "high": high}
    return {"fired": fired, **shares, "relation": kind}


def layers(store: KeptStore, address: str, feature: int) -> dict[str, Any]:
    """The features of the layers before and behind whose directions are nearest.

    `{previous, next, why}`: each `{address, layer, found}` or None; `why` says in a sentence why
    both are None.
    """
    with store.one_look():
        return _layers(store, address, feature)


def _layers(store: KeptStore, address: str, feature: int) -> dict[str, Any]:
    store.check_feature(address, feature)
    known = store.dictionary(address)
    try:
        series = layers_of(store, like=address)
    except InputError as error:
        return {"previous": None, "next": None, "why": str(error)}
    stream = Stream(known["writes"].partition(".")[2])
    if stream not in _SHARED:
        why = f"{stream.value} has a space of its own in each layer: directions are not comparable"
        return {"previous": None, "next": None, "why": why}
    place = [d["address"] for d in series].index(address)
    before, behind = series[max(0, place - 1) : place], series[place + 1 : place + 2]
    sides = [[_nearest(store, address, feature, d) for d in side] for side in (before, behind)]
    return {"previous": next(iter(sides[0]), None), "next": next(iter(sides[1]), None), "why": None}


def _nearest(
    store: KeptStore, address: str, feature: int, other: Mapping[str, Any]
) -> dict[str, Any]:
    name, known = other["address"], store.dictionary(address)
    if max(other["d_sae"], known["d_sae"]) * known["d_out"] * 4 > _WHOLE:
        among = Among(addresses=(name,), limit=_NEAREST)
        cosines = {f.feature: f.score for f in search_like(store, address, feature, among)}
    else:
        products = store.directions(name) @ store.directions(address)[feature]
        best = np.argsort(-products, kind="stable")[:_NEAREST].tolist()
        cosines = {i: float(products[i]) for i in best}
    said, figures = store.described((name, i) for i in cosines), store.figures()[name]
    return {
        "address": name,
        "layer": int(other["reads"].partition(".")[0]),
        "found": [
            {
                "feature": i, "cosine": c, "density": float(figures[i, 0]),
                "explanation": said.get((name, i), (None,))[0],
            }
            for i, c in cosines.items()
        ],
    }  # fmt: skip


def at_random(store: KeptStore, address: str) -> int:
    """A feature that fires, each as likely as the others; any where none does."""
    highest = store.figures()[address][:, 1]
    alive = np.flatnonzero(highest > 0)
    return int(np.random.default_rng().choice(alive if len(alive) else len(highest)))
