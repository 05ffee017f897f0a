"""Tracing as the page asks for it: which transcoders there are, and a graph step by step."""

import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from gemscope import hub
from gemscope.errors import InputError
from gemscope.sites import each, parse_sites

from ._graph_shelf import Shelf
from ._workbench import Workbench
from ._worker import Cancelled

if TYPE_CHECKING:
    from gemscope.circuits import Estimate

_LAYER = re.compile(r"layer_\d+")
_TARGETS = ("logit", "difference", "feature")
"""Kinds of targets; a vector is a file, which a page must not make the server read."""
Put = Callable[[dict[str, Any]], None]


class TraceIn(BaseModel):
    """A graph as the page asks for it."""

    prompt: str = Field(min_length=1, max_length=20_000)
    dictionaries: list[str] = Field(
        min_length=1, max_length=128,
        description="Addresses of transcoders, or the beginning of several.",
    )  # fmt: skip
    targets: list[str] = Field(
        [], max_length=10,
        description="logit:TOKEN, difference:TOKEN:TOKEN or feature:ADDRESS/INDEX; empty for the "
        "likeliest next tokens.",
    )  # fmt: skip
    node_threshold: float = Field(0.8, gt=0, le=1)
    edge_threshold: float = Field(0.98, gt=0, le=1)
    max_features: int = Field(7500, ge=1, le=20_000)
    chat: bool = False


def sets(bench: Workbench) -> list[dict[str, Any]]:
    """Transcoder sets whose files are here or that are indexed: name, addresses, model."""
    here = [
        (e.address, e.kind, [s.layer for s in each(e.writes)], e.model, e.l0)
        for e in hub.catalog()
        if e.kind in ("transcoder", "clt") and e.path is not None
    ]
    here += [
        (
            f["address"],
            f["kind"],
            [s.layer for s in each(parse_sites(f["writes"]))],
            f["model"],
            None,
        )
        for f in bench.known().values()
        if f["kind"] in ("transcoder", "clt")
    ]
    found: dict[str, dict[str, Any]] = {}
    for address, kind, layers, model, l0 in here:
        name = address if kind == "clt" else _LAYER.sub("layer_*", address)
        one = found.setdefault(name, {"name": name, "by_layer": {}, "model": model, "kind": kind,
                                        "l0": l0})  # fmt: skip
        for layer in layers:
            one["by_layer"].setdefault(layer, address)
    return [
        {
            "name": name,
            "kind": one["kind"],
            "model": one["model"],
            "addresses": _unique(one["by_layer"]),
        }
        for name, one in sorted(found.items(), key=_order)
        if len(one["by_layer"]) > 1 and sorted(one["by_layer"]) == list(range(len(one["by_layer"])))
    ]


def _order(pair: tuple[str, Any]) -> tuple[bool, bool, float, str]:
    # The first is what a form begins with: one that reconstructs well with few features.
    name, one = pair
    return one["kind"] == "clt", "affine" not in name, one["l0"] or 0.0, name


def _unique(by_layer: dict[int, str]) -> list[str]:
    return list(dict.fromkeys(by_layer[layer] for layer in sorted(by_layer)))


def set_of(known: Iterable[dict[str, Any]], targets: Iterable[str]) -> str:
    """The set that a form begins with: that of a target feature, or the first."""
    many = list(known)
    for text in targets:
        address = text.removeprefix("feature:").rpartition("/")[0]
        for one in many:
            if address in one["addresses"]:
                return str(one["name"])
    return str(many[0]["name"]) if many else ""


def traced(bench: Workbench, shelf: Shelf, asked: TraceIn, stop: threading.Event, put: Put) -> None:
    """Trace, hand on how far it is, keep the graph and hand on its name."""
    from gemscope import circuits

    bench.limits.check_text(asked.prompt)
    for text in asked.targets:
        if text.partition(":")[0] not in _TARGETS:
            raise InputError(
                f"{text[:100]!r} is no target of this page; write logit:TOKEN, "
                "difference:TOKEN:TOKEN or feature:ADDRESS/INDEX"
            )
    by_name = {one["name"]: one["addresses"] for one in sets(bench)}
    given = [a for name in asked.dictionaries for a in by_name.get(name, [name])]
    addresses = circuits.transcoder_set(given)
    for address in addresses:
        bench.entry(address)
    model = bench.model_of(addresses)
    n_tokens = model.prompts(asked.prompt, chat=asked.chat).ids.shape[1]
    if n_tokens > bench.limits.tokens:
        raise InputError(
            f"the prompt has {n_tokens:,} tokens, and {bench.limits.tokens:,} are read; cut it"
        )

    def planned(estimate: "Estimate") -> None:
        put({"planned": str(estimate)})

    def told(what: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled
        put({"what": what, "done": done, "of": total})

    put({"what": "model", "done": 0, "of": 0})
    graph = circuits.trace(
        asked.prompt, addresses, model=model, targets=asked.targets,
        node_threshold=asked.node_threshold, edge_threshold=asked.edge_threshold,
        max_features=asked.max_features, chat=asked.chat, load=bench.dictionary, progress=told,
        planned=planned,
    )  # fmt: skip
    put({"done": {"name": shelf.add(graph), "nodes": len(graph.nodes), "edges": len(graph.edges)}})
