"""Graphs to the JSON that circuit-tracer writes and Neuronpedia shows.

Constants have no place in it and are left out. A label is the `clerp` of its node. `influence` is
the share that a node and those above it have, so it is small where it matters; here of the nodes
that the graph shows. Names are made of what is named, so that the same graph has the same.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.activations import write_whole
from gemscope.errors import InputError

from ._graph import CONSTANTS, Graph, Kind, Node
from ._influence import cumulative
from ._json import parse

FEATURE, ERROR, EMBEDDING, LOGIT = (
    "cross layer transcoder", "mlp reconstruction error", "embedding", "logit",
)  # fmt: skip
INDEX = "graph-metadata.json"
"""Of a folder of graphs: what its files are."""
VIRTUAL = 2**24
"""Above the ids of tokens: that of a target that is no token begins here."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A graph that was written for others."""

    file: Path
    notes: tuple[str, ...]
    """What the file does not hold, or holds in another way."""


def export_graph(graph: Graph, path: str | Path, *, index: bool = False) -> Exported:
    """Write a graph as JSON for circuit-tracer and Neuronpedia; there whole or not at all.

    With `index`, the folder's `graph-metadata.json`, which circuit-tracer's server lists graphs
    from, is brought up to date.

    Raises:
        InputError: The name does not end in `.json`, or a file cannot be written or read.
    """
    file = Path(path).expanduser()
    if file.suffix != ".json" or file.name == INDEX:
        raise InputError(f"a graph for circuit-tracer is written as NAME.json, not {file.name!r}")
    notes: list[str] = []
    ids = _ids(graph, notes)
    said: dict[str, Any] = {
        "metadata": _metadata(graph, file.stem, notes), "qParams": _view(graph, ids),
        "nodes": _nodes(graph, ids), "links": _links(graph, ids),
    }  # fmt: skip
    left = sum(node.kind in CONSTANTS for node in graph.nodes)
    if left:
        notes.append(
            f"{left} nodes of biases and of MLPs at BOS are left out, so the weights that come "
            "into a node do not sum to its value"
        )
    _write(file, said)
    if index:
        _add_to_index(file.with_name(INDEX), said["metadata"])
    return Exported(file, tuple(notes))


def cantor(a: int, b: int) -> int:
    """One number for two, as circuit-tracer names a layer's feature."""
    return (a + b) * (a + b + 1) // 2 + b


def _ids(graph: Graph, notes: list[str]) -> dict[str, str]:
    """The id of each node in the file, by its own."""
    layers = 1 + max([0, *(one.layer for one in graph.nodes if one.layer is not None)])
    ids = {}
    for node in graph.nodes:
        match node.kind:
            case Kind.FEATURE:
                ids[node.id] = f"{node.layer}_{node.feature}_{node.position}"
            case Kind.EMBEDDING:
                token = graph.token_ids[node.position or 0]
                ids[node.id] = f"E_{max(token, 0)}_{node.position}"
            case Kind.TARGET:
                token, position = _token(graph, node)
                ids[node.id] = f"{layers + 1}_{token}_{position}"
    # circuit-tracer calls an error as the feature of layer 0 with the number of its layer.
    taken, moved = set(ids.values()), 0
    for node in graph.nodes:
        if node.kind is Kind.ERROR:
            free = f"0_{node.layer}_{node.position}"
            moved += free in taken
            ids[node.id] = free if free not in taken else f"error_{node.layer}_{node.position}"
    if moved:
        notes.append(
            f"{moved} errors are called error_LAYER_POSITION, since circuit-tracer would call "
            "them as a feature"
        )
    if any(one.token is None for one in graph.targets):
        notes.append(f"targets that are no tokens have ids from {VIRTUAL} up, in place of tokens'")
    return ids


def _token(graph: Graph, node: Node) -> tuple[int, int]:
    target = graph.targets[node.number or 0]
    shown = [t.token for t in graph.targets if t.position == target.position]
    own = target.token is not None and shown.count(target.token) == 1
    token = target.token if own and target.token is not None else VIRTUAL + (node.number or 0)
    return token, target.position


def _metadata(graph: Graph, stem: str, notes: list[str]) -> dict[str, Any]:
    pieces = [_unmarked(one) for one in graph.tokens]
    if not "".join(pieces).endswith(graph.prompt):
        notes.append("its tokens are written as they are shown, with spaces as ·")
        pieces = list(graph.tokens)
    named = hashlib.sha256("\n".join(graph.dictionaries).encode()).hexdigest()[:12]
    return {
        "slug": re.sub(r"[^a-z0-9-]+", "-", stem.lower()).strip("-") or "graph",
        "scan": f"gemscope-{named}", "transcoder_list": list(graph.dictionaries),
        "prompt_tokens": pieces, "prompt": graph.prompt,
        "node_threshold": graph.settings.get("node_threshold"), "schema_version": 1,
        "info": {"generator": {"name": "gemscope", "version": __version__}, "model": graph.model},
    }  # fmt: skip


def _unmarked(token: str) -> str:
    spaced = re.sub(r"·×(\d{1,4})", lambda found: " " * int(found[1]), token).replace("·", " ")
    return spaced.replace("⏎", "\n").replace("↵", "\r").replace("→", "\t")


def _view(graph: Graph, ids: dict[str, str]) -> dict[str, Any]:
    groups = [[g.label, *(ids[one] for one in g.ids if one in ids)] for g in graph.groups]
    grouped = [one for _, *own in groups for one in own]
    pins = dict.fromkeys([*(ids[one] for one in graph.pinned if one in ids), *grouped])
    return {
        "pinnedIds": list(pins), "supernodes": [g for g in groups if len(g) > 1],
        "linkType": "both", "clickedId": "", "sg_pos": "",
    }  # fmt: skip


def _nodes(graph: Graph, ids: dict[str, str]) -> list[dict[str, Any]]:
    starts = graph.starts()
    # What begins at targets is no influence there.
    shares = cumulative((graph.influence - starts).clamp(min=0)).tolist()
    of_features = {f"{n.layer}_{n.feature}-0" for n in graph.nodes if n.kind is Kind.FEATURE}
    layers = 1 + max([0, *(one.layer for one in graph.nodes if one.layer is not None)])
    out = []
    for node, share in zip(graph.nodes, shares, strict=True):
        if node.id not in ids:
            continue
        named = node.id in graph.labels or graph.address(node) in graph.labels
        made = {
            "node_id": ids[node.id], "feature": -1, "layer": str(node.layer),
            "ctx_idx": node.position, "feature_type": ERROR, "token_prob": 0.0,
            "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": "",
            "clerp": graph.label(node) if named else "", "influence": share, "activation": None,
        }  # fmt: skip
        match node.kind:
            case Kind.FEATURE:
                assert node.layer is not None
                assert node.feature is not None
                made |= {"feature": cantor(node.layer, node.feature), "feature_type": FEATURE,
                         "jsNodeId": f"{node.layer}_{node.feature}-0",
                         "activation": node.activation}  # fmt: skip
            case Kind.ERROR:
                plain = f"{node.layer}_{node.position}-0"
                made["jsNodeId"] = plain if plain not in of_features else f"error_{plain}"
            case Kind.EMBEDDING:
                name = ids[node.id].rpartition("_")[0]
                made |= {"feature": node.position, "layer": "E", "feature_type": EMBEDDING,
                         "jsNodeId": f"{name}-{node.position}"}  # fmt: skip
            case Kind.TARGET:
                made |= _logit(graph, node, layers + 1, made["clerp"])
        out.append(made)
    return out


def _logit(graph: Graph, node: Node, layer: int, label: str) -> dict[str, Any]:
    token, position = _token(graph, node)
    target = graph.targets[node.number or 0]
    # Beside tokens' probabilities, what circuit-tracer puts here is how much a target counts.
    share = target.weight if target.probability is None else target.probability
    said = f'Output "{_unmarked(target.label)}" (p={share:.3f})'
    return {
        "feature": token, "layer": str(layer), "ctx_idx": position, "feature_type": LOGIT,
        "jsNodeId": f"L_{token}-{position}", "clerp": label or said, "token_prob": share,
        "is_target_logit": node.number == 0, "influence": None,
    }  # fmt: skip


def _links(graph: Graph, ids: dict[str, str]) -> list[dict[str, Any]]:
    names = [ids.get(node.id) for node in graph.nodes]
    ends = zip(graph.edges.source.tolist(), graph.edges.target.tolist(),
               graph.edges.weight.tolist(), strict=True)  # fmt: skip
    return [
        {"source": names[s], "target": names[t], "weight": w} for s, t, w in ends if names[s]
    ]  # fmt: skip


def _add_to_index(file: Path, metadata: dict[str, Any]) -> None:
    known: list[Any] = []
    if file.exists():
        try:
            found = parse(file.read_bytes())
            known = [g for g in found["graphs"] if g["slug"] != metadata["slug"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is no index of graphs ({error}): move it away, or export without it"
            ) from None
    _write(file, {"graphs": [*known, metadata]})


def _write(file: Path, value: Any) -> None:
    try:
        write_whole(file, json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
