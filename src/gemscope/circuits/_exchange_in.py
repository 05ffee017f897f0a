"""Graphs from the JSON that circuit-tracer writes and Neuronpedia offers for download.

What a node is, its `feature_type` says: an error's id can be that of a feature of layer 0. Links
of such an id go to whom they can belong; where it could be either they are left out, and counted
in `settings["notes"]`. Influence and scores are computed from the links that the file has.

The file has no biases and not all edges. A feature's activation is what all that comes in sums to
(so it is for ReLU and JumpReLU), so that the remainder is what the file does not show. Of a target
neither is known: NaN.
"""

import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemscope.errors import InputError
from gemscope.features import marked

from ._exchange import EMBEDDING, ERROR, FEATURE, LOGIT
from ._graph import CONSTANTS, Books, Edges, Graph, Group, Kind, Node, Scores, Target
from ._influence import graph_scores, influence
from ._json import clean, parse

LARGEST = 512 * 2**20
"""Bytes of a file, which is held in memory whole."""
_KINDS = {FEATURE: Kind.FEATURE, ERROR: Kind.ERROR, EMBEDDING: Kind.EMBEDDING, LOGIT: Kind.TARGET}
_MOST_LAYERS = 1_000
_LONGEST = 1_000


def import_graph(path: str | Path) -> Graph:
    """The graph in a JSON file of circuit-tracer or Neuronpedia.

    Raises:
        InputError: It is none, is damaged, or says what cannot be so.
    """
    file = Path(path).expanduser()
    said = _read(file)
    try:
        return _Reader(said).graph()
    except _WrongError as error:
        raise InputError(
            f"{file} is no graph of circuit-tracer's: {clean(str(error))[:300]}; export it again"
        ) from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def uncantor(number: int) -> tuple[int, int]:
    """The two numbers that circuit-tracer has made one of."""
    w = (math.isqrt(8 * number + 1) - 1) // 2
    b = number - w * (w + 1) // 2
    return w - b, b


def _read(file: Path) -> Any:
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise InputError(f"{file} is no file of at most {LARGEST >> 20} MiB")
        return parse(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not valid JSON: {error}") from None


class _WrongError(Exception):
    """What a file says that cannot be so."""


class _Reader:
    """One file."""

    def __init__(self, said: Any) -> None:
        known = isinstance(said, dict) and all(n in said for n in ("metadata", "nodes", "links"))
        if not known:
            raise _WrongError("it lacks metadata, nodes or links")
        self.said = said
        self.meta = _is(said["metadata"], dict, "metadata")
        self.notes: list[str] = []
        tokens = _is(self.meta.get("prompt_tokens"), list, "metadata.prompt_tokens")
        self.tokens = [_text(one, "a token") for one in tokens]
        if not self.tokens:
            raise _WrongError("it has no tokens")
        self.nodes: list[Node] = []
        self.targets: list[Target] = []
        self.labels: dict[str, str] = {}
        self.token_ids = [-1] * len(self.tokens)
        self.activations: list[float | None] = []
        self.by_id: dict[str, list[int]] = defaultdict(list)
        self.left: set[str] = set()

    def graph(self) -> Graph:
        for one in _is(self.said["nodes"], list, "nodes"):
            self._node(_is(one, dict, "a node"))
        self._check_nodes()
        edges = self._edges()
        view = _is(self.said.get("qParams") or {}, dict, "qParams")
        groups, pinned = self._groups(view), self._pinned(view)
        settings: dict[str, Any] = {"from": "circuit-tracer", "notes": self.notes}
        known = {name: self.meta.get(name) for name in ("slug", "node_threshold")}
        settings |= {name: v for name, v in known.items() if isinstance(v, str | int | float)}
        graph = Graph(
            prompt=_text(self.meta.get("prompt", ""), "metadata.prompt", 2**20),
            tokens=tuple(marked(clean(one)) for one in self.tokens),
            token_ids=tuple(self.token_ids), model=self._model(), dictionaries=self._dictionaries(),
            nodes=tuple(self.nodes), edges=edges, targets=self._weighed(),
            books=self._books(edges), labels=self.labels, groups=groups, pinned=pinned,
            settings=settings, scores=Scores(replacement=0.0, completeness=0.0),
            influence=torch.zeros(len(self.nodes), dtype=torch.float64),
        )  # fmt: skip
        through = influence(edges, graph.kinds(*CONSTANTS), graph.starts())
        return replace(graph, influence=through, scores=graph_scores(graph))

    def _node(self, said: dict[str, Any]) -> None:
        name = _text(said.get("node_id"), "node_id")
        kind = _KINDS.get(_text(said.get("feature_type"), "feature_type"))
        if kind is None:
            self.left.add(name)
            return
        position = _count(said.get("ctx_idx"), f"ctx_idx of {name}", len(self.tokens))
        activation = said.get("activation")
        activation = None if activation is None else _number(activation, f"activation of {name}")
        label = clean(_text(said.get("clerp") or "", f"clerp of {name}"))
        match kind:
            case Kind.EMBEDDING:
                node = Node(kind, position=position)
                if found := re.fullmatch(r"E_(\d{1,9})_\d+", name):
                    self.token_ids[position] = int(found[1])
            case Kind.TARGET:
                self._target(said, name, position, label)
                node = Node(kind, position=position, number=len(self.targets) - 1)
                label = ""
            case _:
                layer = said.get("layer")
                if not isinstance(layer, str | int) or not str(layer).isdecimal():
                    raise _WrongError(f"the layer of {name} is {layer!r}, and not a number")
                number = _count(int(str(layer)[:9]), f"layer of {name}", _MOST_LAYERS)
                index = None if kind is Kind.ERROR else self._index(said, name, number)
                node = Node(kind, number, position, index, activation or 0.0)
        if label:
            self.labels[node.id] = label
        self.by_id[name].append(len(self.nodes))
        self.nodes.append(node)
        self.activations.append(activation if kind is Kind.FEATURE else None)

    def _index(self, said: dict[str, Any], name: str, layer: int) -> int:
        """The number of a feature in its layer: of its id, or of the number for both."""
        if found := re.fullmatch(r"(\d{1,9})_(\d{1,9})_(\d{1,9})", name):
            if int(found[1]) != layer:
                raise _WrongError(f"{name} says another layer than its node, {layer}")
            return int(found[2])
        at, index = uncantor(_count(said.get("feature"), f"feature of {name}", 2**60))
        if at != layer:
            raise _WrongError(f"neither the id nor the number of {name} says which feature it is")
        return index

    def _target(self, said: dict[str, Any], name: str, position: int, label: str) -> None:
        chance = _number(said.get("token_prob", 0.0), f"token_prob of {name}")
        if not 0 <= chance <= 1:
            raise _WrongError(f"token_prob of {name} is {chance}")
        token = _count(said.get("feature"), f"feature of {name}", 2**31)
        if found := re.fullmatch(r'Output "(.*)" \(p=[\d.]+\)', label, flags=re.DOTALL):
            label = marked(found[1])
        self.targets.append(
            Target(text=f"logit:{label}", label=label or f"token {token}", position=position,
                   value=0.0, weight=chance, token=token, probability=chance)
        )  # fmt: skip

    def _weighed(self) -> tuple[Target, ...]:
        total = sum(one.weight for one in self.targets)
        even = 1 / len(self.targets)
        return tuple(
            replace(one, weight=one.weight / total if total else even) for one in self.targets
        )

    def _check_nodes(self) -> None:
        if not self.targets:
            raise _WrongError("it has no logit to explain")
        if len({node.id for node in self.nodes}) < len(self.nodes):
            raise _WrongError("it has a node twice")
        for name, places in self.by_id.items():
            kinds = [self.nodes[p].kind for p in places]
            if len(places) > 1 and sorted(kinds) != [Kind.ERROR, Kind.FEATURE]:
                raise _WrongError(f"several nodes are called {name}")
        if self.left:
            self.notes.append(f"{len(self.left)} nodes of kinds that are not known are left out")

    def _edges(self) -> Edges:
        found: dict[tuple[int, int], float] = {}
        unsure: dict[tuple[str, int], list[float]] = defaultdict(list)
        for one in _is(self.said["links"], list, "links"):
            link = _is(one, dict, "a link")
            source, target = (
                _text(link.get(end), f"the {end} of a link") for end in ("source", "target")
            )
            weight = _number(link.get("weight"), f"the weight of {source} to {target}")
            if source in self.left or target in self.left:
                continue
            ends = [self._among(name) for name in (source, target)]
            # Nothing comes into an error: of two with that name it is the feature.
            place = min(ends[1], key=lambda p: self.nodes[p].kind is Kind.ERROR)
            if len(able := self._able(ends[0], place)) > 1:
                unsure[source, place].append(weight)
                continue
            if (pair := (able[0], place)) in found:
                raise _WrongError(f"the link of {source} to {target} is there twice")
            found[pair] = weight
        self._either(unsure, found)
        pairs = list(found)
        return Edges(
            torch.tensor([s for s, _ in pairs], dtype=torch.int32),
            torch.tensor([t for _, t in pairs], dtype=torch.int32),
            torch.tensor([found[pair] for pair in pairs], dtype=torch.float32),
        )

    def _among(self, name: str) -> list[int]:
        if name not in self.by_id:
            raise _WrongError(f"it has a link of {name}, which it has no node for")
        return self.by_id[name]

    def _able(self, sources: list[int], target: int) -> list[int]:
        """Which of the nodes of one name can lead to a node."""
        to = self.nodes[target]
        if to.kind not in (Kind.FEATURE, Kind.TARGET):
            raise _WrongError(f"it has a link into {to.id}, which nothing comes into")
        out = [
            place for place in sources
            if (one := self.nodes[place]).kind is not Kind.TARGET
            and (to.layer is None or one.layer is None or one.layer < to.layer)
            and (one.position or 0) <= (to.position or 0)
        ]  # fmt: skip
        if not out:
            raise _WrongError(
                f"{self.nodes[sources[0]].id} cannot lead to {to.id}, which is before it"
            )
        return out

    def _either(
        self, unsure: dict[tuple[str, int], list[float]], found: dict[tuple[int, int], float]
    ) -> None:
        left = 0
        for (name, place), weights in unsure.items():
            if len(weights) == 2:
                # circuit-tracer writes the links of features before those of errors.
                both = sorted(self.by_id[name], key=lambda p: self.nodes[p].kind is Kind.ERROR)
                found.update(zip(((p, place) for p in both), weights, strict=True))
            elif len(weights) > 2:
                raise _WrongError(
                    f"the link of {name} to {self.nodes[place].id} is there too often"
                )
            else:
                left += 1
        if left:
            self.notes.append(
                f"{left} links are left out: they could be of a feature or of an error, which the "
                "file calls alike"
            )

    def _books(self, edges: Edges) -> Books:
        value = torch.tensor(
            [math.nan if one is None else one for one in self.activations], dtype=torch.float64
        )
        rest = value.clone().index_add_(0, edges.target.long(), -edges.weight.double())
        return Books(value, rest, 0.0, 0.0)

    def _groups(self, view: dict[str, Any]) -> tuple[Group, ...]:
        groups: list[Group] = []
        seen: set[str] = set()
        for one in _is(view.get("supernodes") or [], list, "qParams.supernodes"):
            texts = [_text(t, "a supernode") for t in _is(one, list, "a supernode")]
            ids = [i for i in self._named(texts[1:]) if i not in seen]
            seen.update(ids)
            if ids:
                groups.append(Group(clean(texts[0]) or "group", tuple(ids)))
        return tuple(groups)

    def _pinned(self, view: dict[str, Any]) -> tuple[str, ...]:
        pins = _is(view.get("pinnedIds") or [], list, "qParams.pinnedIds")
        return tuple(self._named([_text(one, "a pinned id") for one in pins]))

    def _named(self, names: list[str]) -> list[str]:
        """Nodes that a view names, each once; of a name of two, the feature."""
        places = [
            min(self.by_id[name], key=lambda p: self.nodes[p].kind is Kind.ERROR)
            for name in names if name in self.by_id
        ]  # fmt: skip
        if lost := sum(name not in self.by_id for name in names):
            self.notes.append(f"{lost} ids that are pinned or grouped have no node")
        return list(dict.fromkeys(self.nodes[place].id for place in places))

    def _model(self) -> str:
        info = self.meta.get("info")
        said = info.get("model") if isinstance(info, dict) else None
        return clean(_text(said or self.meta.get("scan") or "unknown", "metadata.scan"))

    def _dictionaries(self) -> tuple[str, ...]:
        layers = [one.layer for one in self.nodes if one.layer is not None]
        count = 1 + max([0, *layers])
        listed = _is(self.meta.get("transcoder_list") or [], list, "metadata.transcoder_list")
        names = [clean(_text(one, "a transcoder")) for one in listed]
        if len(names) == 1:
            return tuple(names) * count
        if len(names) >= count:
            return tuple(names)
        details = self.meta.get("feature_details")
        source = details.get("neuronpedia_source_set") if isinstance(details, dict) else None
        source = clean(_text(source or "transcoder", "neuronpedia_source_set"))
        scan = clean(_text(self.meta.get("scan") or "unknown", "metadata.scan"))
        return tuple(f"{scan}/{layer}-{source}" for layer in range(count))


def _is(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise _WrongError(f"{name} is no {'list' if kind is list else 'object'}")
    return value


def _text(value: Any, name: str, longest: int = _LONGEST) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise _WrongError(f"{name} is no text of at most {longest:,} characters")
    return value


def _count(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise _WrongError(f"{name} is no number from 0 to {most - 1:,}")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e30:
        raise _WrongError(f"{name} is no number")
    return float(value)
