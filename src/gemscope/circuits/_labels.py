"""What the features of a graph are called, from catalog stores."""

from collections.abc import Sequence
from dataclasses import replace

from gemscope.exchange import best_explanation, human_word
from gemscope.features import Store, marked

from ._graph import Graph, Kind

_TOKENS = 3
"""Tokens named of a feature that nobody explained."""


def labelled(graph: Graph, stores: Sequence[Store]) -> Graph:
    """`graph` with the name of each feature that one of `stores` knows.

    That is what the newest note calls it, or the explanation that scored best, or the tokens it
    fires on most. A node that somebody renamed keeps its name.
    """
    found: dict[str, str] = {}
    for store in reversed(stores):  # what several know is taken from the first
        known = {facts["address"] for facts in store.dictionaries()}
        wanted: dict[str, set[int]] = {}
        for node in graph.nodes:
            if node.kind is Kind.FEATURE and node.layer is not None and node.feature is not None:
                wanted.setdefault(graph.dictionaries[node.layer], set()).add(node.feature)
        for address in known & wanted.keys():
            found |= _names(store, address, wanted[address])
    return replace(graph, labels={**found, **graph.labels})


def _names(store: Store, address: str, features: set[int]) -> dict[str, str]:
    out = {}
    rows = store.features(address, ["feature", "tokens"]).to_pylist()
    for row in rows:
        if row["feature"] in features and row["tokens"]:
            tokens = ", ".join(marked(one["token"]) for one in row["tokens"][:_TOKENS])
            out[row["feature"]] = f"on {tokens}"
    explanations: dict[int, list] = {}
    for one in store.explanations(address):
        explanations.setdefault(one.feature, []).append(one)
    notes: dict[int, list] = {}
    for note in store.notes(address):
        notes.setdefault(note.feature, []).append(note)
    for feature in features:
        best = best_explanation(explanations.get(feature, []))
        if name := human_word(notes.get(feature, [])) or (best.text if best else ""):
            out[feature] = name
    return {f"{address}/{feature}": name for feature, name in out.items()}
