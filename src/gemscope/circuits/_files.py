"""A graph as one file: `NAME.safetensors`.

Columns are tensors: of edges `source`, `target` (I32) and `weight` (F32); of nodes `kind` (U8: a
place in `KINDS`), `layer`, `position`, `number` (I32), `feature` (I64), where -1 is none, and
`activation` (F64); `value` and `remainder` of the books and `influence` (F64). All else is JSON in
the file's metadata, under `gemscope.graph`. Files are not trusted: every field is checked.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gemscope.activations import write_whole
from gemscope.errors import InputError

from ._graph import Books, Edges, Graph, Group, Kind, Node, Scores, Target
from ._influence import check_acyclic
from ._json import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

SUFFIX = ".safetensors"
VERSION = 1
KINDS = (Kind.FEATURE, Kind.ERROR, Kind.BOS, Kind.EMBEDDING, Kind.BIAS, Kind.TARGET)
"""What the numbers of kinds stand for, in files of this version."""

_KEY = "gemscope.graph"
_LARGEST = 2**31
_LARGEST_HEADER = 4 * 2**20  # what `read_header` reads
_COLUMNS = {
    "edge.source": "I32", "edge.target": "I32", "edge.weight": "F32", "node.kind": "U8",
    "node.layer": "I32", "node.position": "I32", "node.number": "I32", "node.feature": "I64",
    "node.activation": "F64", "node.value": "F64", "node.remainder": "F64", "node.influence": "F64",
}  # fmt: skip
_PARTS = {
    Kind.FEATURE: ("layer", "position", "feature"), Kind.ERROR: ("layer", "position"),
    Kind.BOS: ("layer", "position"), Kind.EMBEDDING: ("position",), Kind.BIAS: ("layer",),
    Kind.TARGET: ("number",),
}  # fmt: skip

_LONGEST = 2_000
Text = Annotated[str, Field(max_length=_LONGEST)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Token = Annotated[int, Field(ge=-1, lt=2**31)]
"""-1 where a file from elsewhere does not say it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Target(_Strict):
    text: Text
    label: Text
    position: Count
    value: Number
    weight: Share
    token: Count | None
    probability: Share | None


class _Scores(_Strict):
    replacement: Share
    completeness: Share


class _Closure(_Strict):
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Group(_Strict):
    label: Annotated[Text, Field(min_length=1)]
    ids: Annotated[list[Text], Field(min_length=1)]


class _Open(BaseModel):
    """What others fill in, who may say more than is shown."""

    model_config = ConfigDict(strict=True, extra="allow")


class _CheckedEdge(_Open):
    target: Text
    predicted: Number
    frozen: Number | None = None
    model: Number | None = None


class _Agreement(_Open):
    pearson: Number | None
    same_sign: Number | None
    n: Count


class _Checked(_Open):
    edges: list[_CheckedEdge] = []
    nodes: list[_CheckedEdge] = []
    agreement: dict[str, _Agreement] = {}


class _Mean(_Open):
    mean: Number | None
    low: Number | None = None
    high: Number | None = None


class _Return(_Open):
    share: Share


class _Stability(_Open):
    prompts: list[str] = []
    nodes: list[_Return] = []
    edges: list[_Return] = []
    jaccard: dict[str, _Mean] = {}


class _Said(_Strict):
    """The JSON of a file."""

    version: int
    prompt: Annotated[str, Field(max_length=2**20)]
    tokens: Annotated[list[Text], Field(min_length=1)]
    token_ids: list[Token]
    model: Text
    dictionaries: list[Text]
    targets: list[_Target]
    scores: _Scores
    closure: _Closure
    labels: dict[Text, Text]
    groups: list[_Group]
    pinned: list[Text]
    settings: dict[str, Any]
    checked: _Checked | None
    stability: _Stability | None


def save_graph(graph: Graph, path: str | Path) -> Path:
    """Write a graph to `NAME.safetensors`; the file is there whole or not at all.

    Raises:
        InputError: The name ends otherwise, or the file cannot be written.
    """
    from safetensors.torch import save

    file = Path(path).expanduser()
    if file.suffix != SUFFIX:
        raise InputError(f"a graph is written as NAME{SUFFIX}, not as {file.name!r}")
    text = json.dumps(_said(graph), ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > _LARGEST_HEADER // 2:
        raise InputError(
            f"what is said of the graph is {len(text):,} characters, more than its file holds: "
            "prune it further, or give shorter labels"
        )
    raw = save(_columns(graph), {_KEY: text})
    try:
        write_whole(file, raw)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
    return file


def load_graph(path: str | Path) -> Graph:
    """The graph in a file that `save_graph` wrote.

    Raises:
        InputError: It is none, is damaged, is of a later version, or says what cannot be so.
    """
    file = Path(path).expanduser()
    columns, text = _read(file)
    try:
        said = parse(text)
    except ValueError as error:
        raise _wrong(file, f"its JSON cannot be read: {error}") from None
    _check_version(file, said)
    try:
        _Said.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80] or "all of it"
        where = where if where.isprintable() else repr(where)
        raise _wrong(file, f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    nodes = _nodes(file, columns, said)
    edges = Edges(*(columns[f"edge.{name}"] for name in ("source", "target", "weight")))
    _check_edges(file, edges, nodes)
    books = Books(columns["node.value"], columns["node.remainder"], float(said["closure"]["error"]),
                  float(said["closure"]["tolerance"]))  # fmt: skip
    _check_books(file, books, edges)
    influence = columns["node.influence"]
    if not bool((influence.isfinite() & (influence >= 0)).all()):
        raise _wrong(file, "its influence is not of finite numbers from 0 up")
    _check_names(file, said, {node.id for node in nodes})
    return Graph(
        prompt=said["prompt"], tokens=tuple(said["tokens"]), token_ids=tuple(said["token_ids"]),
        model=said["model"], dictionaries=tuple(said["dictionaries"]), nodes=nodes, edges=edges,
        targets=tuple(_target(one) for one in said["targets"]), books=books, influence=influence,
        scores=Scores(**{name: float(v) for name, v in said["scores"].items()}),
        labels=said["labels"], pinned=tuple(said["pinned"]), settings=said["settings"],
        groups=tuple(Group(one["label"], tuple(one["ids"])) for one in said["groups"]),
        checked=said["checked"], stability=said["stability"],
    )  # fmt: skip


def _said(graph: Graph) -> dict[str, Any]:
    return {
        "version": VERSION, "prompt": graph.prompt, "tokens": list(graph.tokens),
        "token_ids": list(graph.token_ids), "model": graph.model,
        "dictionaries": list(graph.dictionaries), "targets": [asdict(t) for t in graph.targets],
        "scores": asdict(graph.scores),
        "closure": {"error": graph.books.error, "tolerance": graph.books.tolerance},
        "labels": {name: _short(text) for name, text in graph.labels.items()},
        "groups": [asdict(group) for group in graph.groups],
        "pinned": list(graph.pinned), "settings": graph.settings, "checked": graph.checked,
        "stability": graph.stability,
    }  # fmt: skip


def _short(label: str) -> str:
    # An explanation can be an essay, and a reader refuses what is longer.
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _columns(graph: Graph) -> dict[str, Tensor]:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        found = [getattr(node, name) for node in graph.nodes]
        return torch.tensor([-1 if one is None else one for one in found], dtype=dtype)

    kinds = [KINDS.index(node.kind) for node in graph.nodes]
    return {
        "edge.source": graph.edges.source.to(torch.int32).contiguous(),
        "edge.target": graph.edges.target.to(torch.int32).contiguous(),
        "edge.weight": graph.edges.weight.float().contiguous(),
        "node.kind": torch.tensor(kinds, dtype=torch.uint8),
        **{f"node.{name}": column(name, torch.int32) for name in ("layer", "position", "number")},
        "node.feature": column("feature", torch.int64),
        "node.activation": column("activation", torch.float64),
        "node.value": graph.books.value.double().contiguous(),
        "node.remainder": graph.books.remainder.double().contiguous(),
        "node.influence": graph.influence.double().contiguous(),
    }  # fmt: skip


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The columns and the JSON text, after the sizes were checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from gemscope.formats import read_header

    infos = read_header(file)
    if file.stat().st_size > _LARGEST:
        raise InputError(f"{file} is larger than {_LARGEST >> 30} GiB, which no graph is")
    try:
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        columns = load(raw)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
    notes = header.get("__metadata__")
    if not isinstance(notes, dict) or not isinstance(notes.get(_KEY), str):
        raise InputError(
            f"{file} holds no attribution graph: gemscope trace writes one, and circuit-tracer's "
            "end in .json"
        )
    if infos.keys() != _COLUMNS.keys():
        odd = sorted(infos.keys() ^ _COLUMNS.keys())
        raise _wrong(file, f"it lacks, or should not have, {', '.join(odd)[:200]}")
    n = {"node": infos["node.kind"].shape, "edge": infos["edge.weight"].shape}
    for name, dtype in _COLUMNS.items():
        info = infos[name]
        if info.dtype != dtype or len(info.shape) != 1 or info.shape != n[name[:4]]:
            raise _wrong(file, f"{name} is {info.dtype} of shape {list(info.shape)}")
    return columns, notes[_KEY]


def _check_version(file: Path, said: Any) -> None:
    version = said.get("version") if isinstance(said, dict) else None
    if type(version) is not int or version < 1:
        raise _wrong(file, "it does not say its version")
    if version > VERSION:
        raise InputError(
            f"{file} is of version {min(version, 2**31)}, and this gemscope reads graphs up to "
            f"version {VERSION}: update gemscope"
        )


def _nodes(file: Path, columns: dict[str, Tensor], said: dict[str, Any]) -> tuple[Node, ...]:
    kinds = columns["node.kind"]
    if len(kinds) == 0 or int(kinds.max()) >= len(KINDS):
        raise _wrong(file, "it has no nodes, or some of a kind that there is not")
    bounds = {"layer": 2**16, "position": len(said["tokens"]), "number": len(said["targets"]),
              "feature": 2**40}  # fmt: skip
    for name, most in bounds.items():
        column = columns[f"node.{name}"]
        needed = torch.tensor([name in _PARTS[kind] for kind in KINDS])[kinds.long()]
        if bool(((column < -1) | (column >= most) | (needed & (column < 0))).any()):
            raise _wrong(file, f"a node has a {name} that there is not")
    if not bool(columns["node.activation"].isfinite().all()):
        raise _wrong(file, "its activations are not finite")
    of_feature = columns["node.layer"][kinds == KINDS.index(Kind.FEATURE)]
    if len(of_feature) and int(of_feature.max()) >= len(said["dictionaries"]):
        raise _wrong(file, "it has features of a layer that it names no dictionary for")
    if any(one["position"] >= len(said["tokens"]) for one in said["targets"]):
        raise _wrong(file, "it has a target at a position past its tokens")
    if len(said["token_ids"]) != len(said["tokens"]):
        raise _wrong(
            file, f"it has {len(said['tokens'])} tokens, and ids of {len(said['token_ids'])}"
        )
    some = {
        name: [None if v < 0 else v for v in columns[f"node.{name}"].tolist()] for name in bounds
    }
    nodes = tuple(
        Node(KINDS[kind], layer, position, feature, activation, number)
        for kind, layer, position, feature, activation, number in zip(
            kinds.tolist(), some["layer"], some["position"], some["feature"],
            columns["node.activation"].tolist(), some["number"], strict=True,
        )
    )  # fmt: skip
    if len({node.id for node in nodes}) < len(nodes):
        raise _wrong(file, "it has a node twice")
    return nodes


def _check_edges(file: Path, edges: Edges, nodes: "Sequence[Node]") -> None:
    n = len(nodes)
    for ends in (edges.source, edges.target):
        if len(ends) and (int(ends.min()) < 0 or int(ends.max()) >= n):
            raise _wrong(file, "it has edges of nodes that it has not")
    if not bool(edges.weight.isfinite().all()):
        raise _wrong(file, "its weights are not finite")
    pairs = edges.source.long() * n + edges.target.long()
    if len(pairs.unique()) < len(pairs):
        raise _wrong(file, "it has an edge twice")
    leads = torch.tensor([node.kind is not Kind.TARGET for node in nodes])
    takes = torch.tensor([node.kind in (Kind.FEATURE, Kind.TARGET) for node in nodes])
    if not bool((leads[edges.source.long()] & takes[edges.target.long()]).all()):
        raise _wrong(file, "it has an edge from a target, or into what nothing comes into")
    try:
        check_acyclic(edges, n)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _check_books(file: Path, books: Books, edges: Edges) -> None:
    known, rest = ~books.value.isnan(), ~books.remainder.isnan()
    if not torch.equal(known, rest):
        raise _wrong(file, "its books have a value without a remainder, or the other way round")
    shown = torch.zeros_like(books.value).index_add_(0, edges.target.long(), edges.weight.double())
    size = torch.zeros_like(shown).index_add_(0, edges.target.long(), edges.weight.double().abs())
    size += books.remainder.abs() + books.value.abs()
    gap = (shown + books.remainder - books.value).abs()
    # Beside what it admits to, weights that are sums in float64 are stored in float32.
    if not bool((gap <= books.error + books.tolerance + 1e-5 * size)[known].all()):
        raise _wrong(file, "its books do not close: edges and remainder do not sum to the value")


def _check_names(file: Path, said: dict[str, Any], ids: set[str]) -> None:
    grouped = [one for group in said["groups"] for one in group["ids"]]
    for what, named in (("groups", grouped), ("pins", said["pinned"])):
        if len(set(named)) < len(named) or not ids.issuperset(named):
            raise _wrong(file, f"it {what} nodes twice, or nodes that it has not")


def _target(one: dict[str, Any]) -> Target:
    chance = one["probability"]
    return Target(
        **one | {"value": float(one["value"]), "weight": float(one["weight"])}
        | {"probability": None if chance is None else float(chance)}
    )  # fmt: skip


def _wrong(file: Path, why: str) -> InputError:
    return InputError(f"{file} is no graph that gemscope wrote, or is damaged: {why}; get it again")
