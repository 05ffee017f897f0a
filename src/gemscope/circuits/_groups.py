"""Nodes that are shown as one: made by hand, or proposed.

A group's edges are the sums of its members', so that what is said of it holds: its books close.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError, did_you_mean

from ._graph import CONSTANTS, Edges, Graph, Group, Kind
from ._influence import summed

MOST = 3_000
"""Features among which groups are proposed: every two are compared."""
LONGEST = 500
"""Characters of a label."""
_DULL = re.compile(
    "a|an|and|are|as|at|by|for|from|in|into|is|it|its|of|on|or|that|the|this|to|with|"
    "features?|tokens?"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Merged:
    """A graph in which each group is one node; it may go round in a circle."""

    labels: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    """Ids of the nodes that each stands for: several of a group, one of anything else."""
    edges: Edges
    """Sums of the members' edges, float64; those within a group are in none."""
    value: Float[Tensor, " n_merged"]
    """Of a group, of all members less what they give each other; NaN where nothing comes in."""
    remainder: Float[Tensor, " n_merged"]
    influence: Float[Tensor, " n_merged"]
    """Of the members together: what goes through two of them counts twice."""


def group(graph: Graph, label: str, ids: Sequence[str]) -> Graph:
    """The graph with these nodes as a group; they leave those they are in.

    Raises:
        InputError: No such node, a target, no label or one that another group has.
    """
    label = _label(label)
    members = tuple(dict.fromkeys(graph.nodes[graph.place(one)].id for one in ids))
    if not members:
        raise InputError(f"the group {label!r} needs at least one node; give ids")
    if targets := [i for i in members if graph.nodes[graph.place(i)].kind is Kind.TARGET]:
        raise InputError(f"{targets[0]} is a target, which every path ends at; group other nodes")
    rest = [Group(g.label, tuple(i for i in g.ids if i not in members)) for g in graph.groups]
    kept = [g for g in rest if g.ids]
    if label in (g.label for g in kept):
        raise InputError(f"there is a group {label!r}; choose another label, or ungroup it first")
    return replace(graph, groups=(*kept, Group(label, members)))


def ungroup(graph: Graph, label: str) -> Graph:
    """The graph without the group of this label; its nodes stay."""
    labels = [g.label for g in graph.groups]
    if label not in labels:
        known = did_you_mean(label, labels) if labels else "the graph has none"
        raise InputError(f"there is no group {label!r}; {known}")
    return replace(graph, groups=tuple(g for g in graph.groups if g.label != label))


def rename(graph: Graph, node: str, label: str) -> Graph:
    """The graph with a node called `label`; with an empty one, as it was called before."""
    own = graph.nodes[graph.place(node)].id
    labels = {name: text for name, text in graph.labels.items() if name != own}
    return replace(graph, labels=labels | ({own: _label(label)} if label.strip() else {}))


def pin(graph: Graph, node: str) -> Graph:
    """The graph with a node that pruning keeps."""
    own = graph.nodes[graph.place(node)].id
    return replace(graph, pinned=tuple(dict.fromkeys((*graph.pinned, own))))


def unpin(graph: Graph, node: str) -> Graph:
    """The graph with a node that pruning may drop."""
    if node not in graph.pinned:
        raise InputError(f"{node} is not pinned; pinned are {', '.join(graph.pinned) or 'none'}")
    return replace(graph, pinned=tuple(one for one in graph.pinned if one != node))


def merged(graph: Graph) -> Merged:
    """The graph with each group as one node, in the place of its first member."""
    of = {one: number for number, g in enumerate(graph.groups) for one in g.ids}
    to: list[int] = []
    labels: list[str] = []
    members: list[list[str]] = []
    seen: dict[int, int] = {}
    for node in graph.nodes:
        number = of.get(node.id)
        if number is not None and number in seen:
            to.append(seen[number])
            members[seen[number]].append(node.id)
            continue
        if number is not None:
            seen[number] = len(labels)
        to.append(len(labels))
        labels.append(graph.label(node) if number is None else graph.groups[number].label)
        members.append([node.id])
    moved, n = torch.tensor(to), len(labels)
    source, target = moved[graph.edges.source.long()], moved[graph.edges.target.long()]
    inner = source == target
    known = ~graph.books.value.isnan()

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(n, dtype=torch.float64)
        return sums.index_add_(0, moved[known], values[known].double())

    value = total(graph.books.value)
    value.index_add_(0, target[inner], -graph.edges.weight[inner].double())
    nothing = torch.ones(n, dtype=torch.bool)
    nothing[moved[known]] = False
    edges = Edges(source[~inner], target[~inner], graph.edges.weight[~inner])
    through = torch.zeros(n, dtype=torch.float64).index_add_(0, moved, graph.influence.double())
    return Merged(
        labels=tuple(labels), members=tuple(map(tuple, members)), edges=summed(edges, n),
        value=value.masked_fill(nothing, torch.nan), influence=through,
        remainder=total(graph.books.remainder).masked_fill(nothing, torch.nan),
    )  # fmt: skip


def propose(
    graph: Graph,
    *,
    directions: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, set[Any]] | None = None,
    threshold: int | float = 0.5,
) -> tuple[Group, ...]:
    """Groups of features that are alike, those of most influence first; nothing is grouped.

    Two features are as alike as the mean of what is known of both says, each from 0 to 1: the
    words of their labels in common (Jaccard), the contexts where they fire in common (Jaccard; by
    `ADDRESS/INDEX`), the cosine of decoder directions (`[d]`, by `ADDRESS/INDEX`), and the cosine
    of what they give to and get from other nodes in this graph. The same feature at two positions
    differs in the last only. Clusters are joined as long as their members are alike by
    `threshold` on average (agglomerative, average linkage). What is in a group already is left.

    Raises:
        InputError: A threshold that is no share, or more than 3,000 features.
    """
    from sklearn.cluster import AgglomerativeClustering  # type: ignore[import-untyped]

    if not 0 < threshold < 1:
        raise InputError(f"threshold is {threshold}; give how alike features are, between 0 and 1")
    taken = {one for g in graph.groups for one in g.ids}
    places = [p for p, node in enumerate(graph.nodes)
              if node.kind is Kind.FEATURE and node.id not in taken]  # fmt: skip
    if len(places) > MOST:
        raise InputError(f"{len(places):,} features are too many to compare; prune to {MOST:,}")
    if len(places) < 2:
        return ()
    alike = similarities(graph, places, directions or {}, contexts or {})
    clusters = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1 - threshold
    ).fit_predict((1 - alike).numpy())
    found: dict[int, list[int]] = {}
    for place, cluster in zip(places, clusters.tolist(), strict=True):
        found.setdefault(cluster, []).append(place)
    several = [one for one in found.values() if len(one) > 1]
    several.sort(key=lambda one: -graph.influence[one].sum().item())
    names = Counter(g.label for g in graph.groups)
    out = []
    for one in several:
        name = _named(graph, one)
        names[name] += 1
        label = name if names[name] == 1 else f"{name} ({names[name]})"
        out.append(Group(label, tuple(graph.nodes[place].id for place in one)))
    return tuple(out)


def similarities(
    graph: Graph,
    places: Sequence[int],
    directions: Mapping[str, Tensor],
    contexts: Mapping[str, set[Any]],
) -> Float[Tensor, "n n"]:
    """How alike features are, from 0 to 1: the mean of what is known of both."""
    nodes = [graph.nodes[place] for place in places]
    names = [graph.address(node) or "" for node in nodes]
    words = [_words(_given(graph, place)) or None for place in places]
    parts = [_connections(graph, places), _overlaps(words)]
    parts.append(_overlaps([contexts.get(name) for name in names]))
    parts.append(_cosines([directions.get(name) for name in names]))
    stack = torch.stack(parts)
    known = ~stack.isnan()
    mean = stack.nan_to_num(0).sum(0) / known.sum(0).clamp(min=1)
    return mean.fill_diagonal_(1.0).clamp(0, 1)


def _connections(graph: Graph, places: Sequence[int]) -> Float[Tensor, "n n"]:
    """Cosines of what features get from and give to other nodes; constants are left out."""
    n, local = len(graph.nodes), {place: row for row, place in enumerate(places)}
    flow = graph.edges.only(~graph.kinds(*CONSTANTS)[graph.edges.source.long()])
    profile = torch.zeros(len(places), 2 * n, dtype=torch.float32)
    ends = zip(flow.source.tolist(), flow.target.tolist(), flow.weight.tolist(), strict=True)
    for source, target, weight in ends:
        if source in local:
            profile[local[source], target] = weight
        if target in local:
            profile[local[target], n + source] = weight
    for half in (profile[:, :n], profile[:, n:]):
        half /= half.norm(dim=1, keepdim=True).clamp(min=1e-12)
    there = [(half.norm(dim=1) > 0).float() for half in (profile[:, :n], profile[:, n:])]
    both = sum(torch.outer(t, t) for t in there)
    cosines = (profile @ profile.T) / torch.as_tensor(both).clamp(min=1)
    return cosines.clamp(0, 1).masked_fill(torch.as_tensor(both) == 0, torch.nan)


def _overlaps(sets: Sequence[set[Any] | None]) -> Float[Tensor, "n n"]:
    """Of every two sets the part they have in common, NaN where one is not known or both empty."""
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    numbers: dict[Any, int] = {}
    rows = [[numbers.setdefault(x, len(numbers)) for x in one or ()] for one in sets]
    sizes = torch.tensor([len(row) for row in rows], dtype=torch.float32)
    starts = [0, *sizes.cumsum(0).long().tolist()]
    columns = [x for row in rows for x in row]
    held = csr_array(([1.0] * len(columns), columns, starts), shape=(len(rows), len(numbers) or 1))
    common = torch.from_numpy((held @ held.T).toarray()).float()
    either = sizes[:, None] + sizes - common
    unknown = torch.tensor([one is None for one in sets])
    return (common / either).masked_fill(unknown[:, None] | unknown | (either == 0), torch.nan)


def _cosines(vectors: Sequence[Tensor | None]) -> Float[Tensor, "n n"]:
    found = torch.full((len(vectors), len(vectors)), torch.nan)
    known = [i for i, one in enumerate(vectors) if one is not None]
    if not known:
        return found
    rows = [one.detach().cpu().float() for one in vectors if one is not None]
    if len({row.shape for row in rows}) > 1:
        raise InputError("directions are of different lengths; give those of one model's stream")
    stack = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    at = torch.tensor(known)
    found[at[:, None], at] = (stack @ stack.T).clamp(0, 1)
    return found


def _given(graph: Graph, place: int) -> str:
    """The label that somebody gave a node or its feature; empty without."""
    node = graph.nodes[place]
    return graph.labels.get(node.id) or graph.labels.get(graph.address(node) or "") or ""


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[^\W_]+", text.lower()) if not _DULL.fullmatch(w)}


def _named(graph: Graph, places: Sequence[int]) -> str:
    """A label that all members have, the words that most have, or the leading member's name."""
    given = [text for place in places if (text := _given(graph, place))]
    if given and len(set(given)) == 1:
        return given[0][:LONGEST]
    counts = Counter(word for text in given for word in sorted(_words(text)))
    common = [word for word, count in counts.most_common(4) if count * 2 > len(given) > 1]
    if common:
        return " ".join(common)[:LONGEST]
    first = max(places, key=lambda place: graph.influence[place].item())
    node = graph.nodes[first]
    name = _given(graph, first) or f"feature {node.layer}.{node.feature}"
    return f"like {name}"[:LONGEST]


def _label(text: str) -> str:
    text = text.strip()
    if not text or len(text) > LONGEST or not text.isprintable():
        raise InputError(
            f"a label is one line of 1 to {LONGEST} characters; {text[:40]!r} is not: give another"
        )
    return text
