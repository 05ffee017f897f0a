"""The tree of clusters as nested groups of a number that can be read: branches of the merges."""

from dataclasses import dataclass, field
from typing import Any

_CHILDREN = 12
"""Groups that a group is divided into, at most, except the last: these list their clusters."""
_LEVELS = 2
"""Of groups above the clusters."""
_NAMED = 2
"""Largest clusters that a group is called by."""


@dataclass(slots=True)
class Group:
    """A branch of the tree: other groups, and clusters that are in none of them."""

    number: int
    size: int
    """Features."""
    name: str = ""
    groups: list["Group"] = field(default_factory=list)
    clusters: list[dict[str, Any]] = field(default_factory=list)
    """Of two features or more, as `gemscope cluster --json` has them, the largest first."""
    alone: list[int] = field(default_factory=list)
    """Features that are in no cluster with another."""
    all_clusters: list[int] = field(default_factory=list)
    """Numbers of all clusters under it, those of single features among them."""


@dataclass(slots=True)
class Tree:
    """Groups by their numbers; the first is the whole."""

    groups: list[Group] = field(default_factory=list)

    @property
    def root(self) -> Group:
        """The whole tree."""
        return self.groups[0]


def tree_of(record: dict[str, Any]) -> Tree:
    """The groups of a record of `gemscope cluster --json`."""
    made = _Builder(record)
    tree = Tree()
    made.group(tree, made.top, 0)
    return tree


class _Builder:
    def __init__(self, record: dict[str, Any]):
        self._clusters = record["clusters"]
        self._merges = record["tree"]
        self._leaves = record["leaves"]
        n = len(self._leaves)
        of = {f: one["id"] for one in self._clusters for f in one["members"]}
        # Clusters below a node: a node that is within one cluster is not divided further.
        self._below: list[int | None] = [of[f] for f in self._leaves]
        self._size = [1] * n
        for merge in self._merges:
            left, right = self._below[merge["left"]], self._below[merge["right"]]
            self._below.append(left if left == right else None)
            self._size.append(merge["size"])
        self._n = n
        self.top = len(self._below) - 1

    def group(self, tree: Tree, node: int, level: int) -> Group:
        """A node as a group with all that is in it."""
        made = Group(len(tree.groups), self._size[node])
        tree.groups.append(made)
        for child in self._divided(node, level):
            number = self._below[child]
            if number is None:
                made.groups.append(self.group(tree, child, level + 1))
            elif self._size[child] > 1:
                made.clusters.append(self._clusters[number])
            else:
                made.alone.append(self._leaves[child])
        made.groups.sort(key=lambda g: (-g.size, g.number))
        made.clusters.sort(key=lambda c: (-c["size"], c["id"]))
        made.all_clusters = self._numbers(node)
        largest = sorted(self._clusters[c]["id"] for c in made.all_clusters)[:_NAMED]
        made.name = " · ".join(self._clusters[c]["name"] for c in largest)
        return made

    def _divided(self, node: int, level: int) -> list[int]:
        """The parts of a node: its largest branches, or at the last level all its clusters."""
        if self._below[node] is not None:
            return [node]
        parts: list[int] = []
        open_ = [node]
        while open_:
            open_.sort(key=lambda i: self._size[i])
            if level < _LEVELS and len(open_) >= _CHILDREN:
                break
            merge = self._merges[open_.pop() - self._n]
            for child in (merge["left"], merge["right"]):
                (open_ if self._below[child] is None else parts).append(child)
        return parts + open_

    def _numbers(self, node: int) -> list[int]:
        found, open_ = set(), [node]
        while open_:
            here = open_.pop()
            number = self._below[here]
            if number is not None:
                found.add(number)
            else:
                merge = self._merges[here - self._n]
                open_ += [merge["left"], merge["right"]]
        return sorted(found)
