"""What a reader does to a graph: names, groups, pins; and what the model then does."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from gemscope import hub
from gemscope.errors import InputError

from ._workbench import Workbench

if TYPE_CHECKING:
    from torch import Tensor

    from gemscope.circuits import Graph

Id = Annotated[str, Field(max_length=100)]
_TOP = 10
"""Tokens that are shown before and after."""


class GroupIn(BaseModel):
    """Nodes that are shown as one."""

    label: str = Field(min_length=1, max_length=200)
    ids: list[Id] = Field(min_length=1, max_length=2_000)


class ViewIn(BaseModel):
    """Groups and pins as the page sends them; what is left out stays."""

    groups: list[GroupIn] | None = Field(None, max_length=500)
    pinned: list[Id] | None = Field(None, max_length=2_000)


class NameIn(BaseModel):
    """A new name of a node; an empty one takes the old one away."""

    id: Id
    label: str = Field(max_length=200)
    note: bool = Field(False, description="Keep it as a note of the feature in its store too.")


class IdsIn(BaseModel):
    """Some nodes."""

    ids: list[Id] = Field(max_length=5_000)


class ChangeIn(BaseModel):
    """Features to change, each at its own position."""

    ids: list[Id] = Field(min_length=1, max_length=100)
    multiple: float = Field(ge=-10, le=10, description="Of its activation; 0 ablates.")


def viewed(graph: "Graph", given: ViewIn) -> "Graph":
    """The graph with other groups and pins; refuses nodes it has not, and nodes of two groups."""
    from gemscope.circuits import Group

    if given.groups is not None:
        seen: set[str] = set()
        for group in given.groups:
            for one in group.ids:
                graph.place(one)
                if one in seen:
                    raise InputError(f"{one} is in two groups; take it out of one")
                seen.add(one)
        groups = tuple(Group(g.label, tuple(g.ids)) for g in given.groups)
        graph = replace(graph, groups=groups)
    if given.pinned is not None:
        pinned = tuple(dict.fromkeys(given.pinned))
        for one in pinned:
            graph.place(one)
        graph = replace(graph, pinned=pinned)
    return graph


def renamed(graph: "Graph", given: NameIn) -> "Graph":
    """The graph with another name of a node."""
    graph.place(given.id)
    labels = {k: v for k, v in graph.labels.items() if k != given.id}
    if label := given.label.strip():
        labels[given.id] = label
    return replace(graph, labels=labels)


def intervened(bench: Workbench, graph: "Graph", given: ChangeIn) -> dict[str, Any]:
    """The likeliest next tokens before and after features are multiplied where the graph has them.

    The features' directions are added to what the MLPs write, so that their errors, and everything
    else at the position, stay. Of each target that is a token: its logit less the mean logit before
    and after, and by how much the graph's edges say that it changes.
    """
    import torch

    from gemscope.steering import Steering, change_of

    known, changes = {}, []
    for one in dict.fromkeys(given.ids):
        node = graph.nodes[graph.place(one)]
        address = graph.address(node)
        if address is None:
            raise InputError(f"{one} is no feature; the model is run with features changed")
        dictionary, _ = hub.feature_of(address)
        known[dictionary] = bench.dictionary(dictionary)
        changes.append(
            change_of(
                address, "ablate" if given.multiple == 0 else "multiply",
                None if given.multiple == 0 else given.multiple, positions=str(node.position),
                known=known,
            )
        )  # fmt: skip
    model = bench.model(graph.model)
    batch = model.prompts(graph.prompt, chat=bool(graph.settings.get("chat")))
    if batch.ids[0].tolist() != list(graph.token_ids):
        raise InputError(
            f"{graph.model} makes other tokens of the prompt than the graph has; trace it again"
        )
    steering = Steering(changes)
    steering.check(model)
    at = graph.targets[0].position if graph.targets else len(graph.tokens) - 1
    with torch.no_grad():
        before = model.run(batch, logits=True).logits[0, at].double().cpu()
        after = model.run(batch, edits=[steering], logits=True).logits[0, at].double().cpu()
    expected = predicted(graph, given.ids, given.multiple)
    return {
        "ids": list(dict.fromkeys(given.ids)), "multiple": given.multiple, "position": at,
        "tokens": _tokens(model.tokenizer, before, after),
        "targets": [
            {"id": f"target.{n}", "label": t.label, "before": _centred(before, t.token),
             "after": _centred(after, t.token), "predicted": expected[n]}
            for n, t in enumerate(graph.targets) if t.token is not None and t.position == at
        ],
    }  # fmt: skip


def predicted(graph: "Graph", ids: list[str], multiple: int | float) -> list[float]:
    """By how much each target's value changes over the edges of the graph.

    In the frozen model activations follow their pre-activations one for one: a feature that gets
    some share more than its activation passes on that share of each of its edges.
    """
    import torch

    from gemscope.circuits import Kind

    share = torch.zeros(len(graph.nodes), dtype=torch.float64)
    fixed = {graph.place(one) for one in ids}
    share[sorted(fixed)] = multiple - 1
    source, target = graph.edges.source.long(), graph.edges.target.long()
    weight = graph.edges.weight.double()
    by_layer: dict[int, list[int]] = {}
    for place, node in enumerate(graph.nodes):
        if node.kind is Kind.FEATURE and place not in fixed and node.activation:
            by_layer.setdefault(node.layer or 0, []).append(place)
    activation = torch.tensor([node.activation or 1.0 for node in graph.nodes]).double()
    gained = torch.zeros_like(share)
    for layer in sorted(by_layer):
        gained.zero_().index_add_(0, target, weight * share[source])
        places = torch.tensor(by_layer[layer])
        share[places] = gained[places] / activation[places]
    gained.zero_().index_add_(0, target, weight * share[source])
    out = [0.0] * len(graph.targets)
    for place, node in enumerate(graph.nodes):
        if node.kind is Kind.TARGET and node.number is not None:
            out[node.number] = gained[place].item()
    return out


def _centred(logits: "Tensor", token: int) -> float:
    return float(logits[token] - logits.mean())


def _tokens(tokenizer: Any, before: "Tensor", after: "Tensor") -> list[dict[str, Any]]:
    """The likeliest tokens of either, by the probability before."""
    from gemscope.features import marked

    one, two = before.softmax(0), after.softmax(0)
    ids = {*one.topk(_TOP).indices.tolist(), *two.topk(_TOP).indices.tolist()}
    return [
        {"token": marked(tokenizer.decode([i])), "before": float(one[i]), "after": float(two[i])}
        for i in sorted(ids, key=lambda i: -float(one[i]))
    ]


def compared(first: "Graph", second: "Graph") -> dict[str, Any]:
    """Features of two graphs: in both, only in the first, only in the second.

    A feature counts once, however many positions it has; the most influential come first.
    """
    sides = [_features(first), _features(second)]
    names = {key: side[key]["label"] for side in reversed(sides) for key in side}
    both = sides[0].keys() & sides[1].keys()

    def row(key: str) -> dict[str, Any]:
        found = [side.get(key) for side in sides]
        return {
            "address": key, "label": names[key],
            "first": found[0], "second": found[1],
        }  # fmt: skip

    def weight(key: str) -> float:
        return -max(side[key]["influence"] for side in sides if key in side)

    def rows(keys: Any) -> list[dict[str, Any]]:
        return [row(key) for key in sorted(keys, key=lambda k: (weight(k), k))]

    union = len(sides[0].keys() | sides[1].keys())
    return {
        "shared": rows(both), "first": rows(sides[0].keys() - both),
        "second": rows(sides[1].keys() - both), "jaccard": len(both) / union if union else None,
    }  # fmt: skip


def _features(graph: "Graph") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for place, node in enumerate(graph.nodes):
        if (address := graph.address(node)) is None:
            continue
        one = found.setdefault(
            address, {"label": graph.label(node), "influence": 0.0, "at": [], "layer": node.layer}
        )
        one["influence"] += float(graph.influence[place])
        one["at"].append({"id": node.id, "position": node.position,
                          "token": graph.tokens[node.position or 0]})  # fmt: skip
    return found
