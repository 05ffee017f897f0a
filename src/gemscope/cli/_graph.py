"""`gemscope graph`."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, percent, print_json

if TYPE_CHECKING:
    from gemscope.circuits import Graph


def graph_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A graph: .safetensors of gemscope trace, or .json of circuit-tracer or Neuronpedia.")],
    top: Annotated[int, typer.Option(help="How many nodes and paths are shown.", min=1)] = 10,
    nodes: Annotated[float | None, typer.Option(help="Prune what is shown to nodes that carry this share of the influence.")] = None,
    edges: Annotated[float | None, typer.Option(help="The same of edges.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the graph as .svg, .png or .pdf.")] = None,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as .json for circuit-tracer and Neuronpedia, or as .safetensors.")] = None,
    group: Annotated[list[str] | None, typer.Option(metavar="LABEL=ID,ID", help="Show nodes as one. May be repeated, as may all edits; edits are kept in FILE.")] = None,
    ungroup: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Show the nodes of a group by themselves again.")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="ID=LABEL", help="Call a node something else; without a label, as before.")] = None,
    pin: Annotated[list[str] | None, typer.Option(metavar="ID", help="Keep a node whatever is pruned.")] = None,
    unpin: Annotated[list[str] | None, typer.Option(metavar="ID", help="Treat a pinned node as any other.")] = None,
    propose_groups: Annotated[bool, typer.Option("--propose-groups", help="Say which features are alike in labels and connections.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Read, edit, draw and convert an attribution graph."""
    from gemscope import circuits

    edits = {"group": group, "ungroup": ungroup, "rename": rename, "pin": pin, "unpin": unpin}
    _check_outputs(file, picture, export)
    graph = circuits.load_graph_file(file)
    if any(edits.values()):
        _check_kept(file)
        graph = _edited(graph, edits)
        circuits.save_graph_file(graph, file)
    if nodes is not None or edges is not None:
        graph = circuits.pruned(
            graph, nodes=1 if nodes is None else nodes, edges=1 if edges is None else edges
        )
    notes: tuple[str, ...] = ()
    if picture is not None:
        circuits.draw(graph, picture)
    if export is not None:
        notes = circuits.save_graph_file(graph, export)
    proposed = circuits.propose(graph) if propose_groups else None
    if json:
        print_json(_value(graph, top, notes, proposed))
        return
    print_graph(graph, top)
    out = console()
    if proposed is not None:
        _print_proposed(graph, proposed)
    for what, path in (("The figure", picture), ("Written", export)):
        if path is not None:
            out.print(f"\n{what}: {path}", markup=False, soft_wrap=True)
    for note in notes:
        out.print(f"Note: {note}.", markup=False, soft_wrap=True)


def _check_outputs(file: Path, picture: Path | None, export: Path | None) -> None:
    from gemscope import circuits
    from gemscope.relate import check_figure

    for one in (picture, export):
        if one is not None and one.expanduser().absolute() == file.expanduser().absolute():
            raise InputError(f"{one} is the graph that is read; write to another file")
    if picture is not None:
        check_figure(picture.expanduser())
    if export is not None:
        circuits.check_graph_file(export)


def _edited(graph: "Graph", edits: dict[str, list[str] | None]) -> "Graph":
    from gemscope import circuits

    for label in edits["ungroup"] or ():
        graph = circuits.ungroup(graph, label)
    for text in edits["group"] or ():
        label, equals, ids = text.rpartition("=")
        if not equals:
            raise InputError(f"{text!r} names no group; write LABEL=ID,ID, ids as in the table")
        graph = circuits.group(graph, label, [one.strip() for one in ids.split(",") if one.strip()])
    for text in edits["rename"] or ():
        node, equals, label = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} names no label; write ID=LABEL, or ID= to take it back")
        graph = circuits.rename(graph, node.strip(), label)
    for node in edits["pin"] or ():
        graph = circuits.pin(graph, node)
    for node in edits["unpin"] or ():
        graph = circuits.unpin(graph, node)
    return graph


def _check_kept(file: Path) -> None:
    if file.suffix != ".safetensors":
        raise InputError(
            f"edits are kept in gemscope's own files, and {file} is none: write one with "
            "--export NAME.safetensors, and edit that"
        )


def _value(graph: "Graph", top: int, notes: tuple[str, ...], proposed: Any) -> dict[str, Any]:
    from gemscope import circuits

    paths = [
        {"nodes": list(one.ids), "weights": list(one.weights), "share": one.share,
         "sentence": one.sentence}
        for one in circuits.strongest_paths(graph, top)
    ]  # fmt: skip
    said = graph.json() | {"paths": paths, "notes": list(notes)}
    if proposed is not None:
        said["proposed"] = [{"label": one.label, "ids": list(one.ids)} for one in proposed]
    return said


def print_graph(graph: "Graph", top: int = 10) -> None:
    """A graph in words: targets, scores, books, nodes, paths, and what was made of its claims."""
    from gemscope import circuits

    out = console()

    def say(text: str) -> None:
        out.print(_plain(text), markup=False, soft_wrap=True)

    say(f"“{graph.prompt}”")
    names = list(dict.fromkeys(graph.dictionaries))
    say(f"{graph.model}, through {names[0] if names else 'nothing'}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "") + "\n")  # fmt: skip
    _print_targets(graph)
    say(f"\nReplacement {graph.scores.replacement:.3f}, completeness "
        f"{graph.scores.completeness:.3f}; {_closure(graph)}")  # fmt: skip
    kinds = Counter(str(node.kind) for node in graph.nodes)
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    say(f"{len(graph.nodes):,} nodes ({said}), {len(graph.edges):,} edges\n")
    _print_nodes(graph, top)
    paths = circuits.strongest_paths(graph, min(top, 5))
    if paths:
        say("\nStrongest paths, with the share of the influence that takes them:")
    for path in paths:
        say(f"{percent(path.share):>7}  {path.sentence}")
    for one in graph.groups:
        say(f"\nGroup “{one.label}”: {', '.join(one.ids)}")
    if graph.pinned:
        say(f"\nPinned: {', '.join(graph.pinned)}")
    _print_claims(graph, say)
    notes = graph.settings.get("notes")
    for note in notes if isinstance(notes, list) else ():
        say(f"Note: {note}.")


def _closure(graph: "Graph") -> str:
    if graph.settings.get("from") == "circuit-tracer":
        return "of another program's file, so nobody knows whether the books close"
    return (
        f"books close to {number(graph.books.error, 2)} (rounding allows "
        f"{number(graph.books.tolerance, 2)})"
    )


def _print_targets(graph: "Graph") -> None:
    import torch

    table = _table()
    for head in ("target", "at", "probability", "value", "shown", "not shown"):
        table.add_column(head, justify="left" if head == "target" else "right", no_wrap=True)
    shown = torch.zeros_like(graph.books.value)
    shown.index_add_(0, graph.edges.target.long(), graph.edges.weight.double())
    for place, node in enumerate(graph.nodes):
        if node.number is None:
            continue
        target, rest = graph.targets[node.number], graph.books.remainder[place].item()
        table.add_row(
            _cell(graph.label(node)), str(target.position), percent(target.probability),
            number(graph.books.value[place].item()), f"{shown[place].item():+.4g}",
            f"{rest:+.4g}" if rest == rest else "-",
        )  # fmt: skip
    console().print(table)


_CHECKS = {
    "frozen": "edges, all else held",
    "model": "edges, in the real model",
    "model_feature": "  from features",
    "model_error": "  from errors",
    "model_embedding": "  from tokens",
    "frozen_nodes": "nodes ablated, frozen model",
    "model_nodes": "nodes ablated, real model",
}
"""What agreement is told of, and in which words."""


def _print_nodes(graph: "Graph", top: int) -> None:
    heads = ("node", "at", "influence", "activation", "label")
    order = graph.influence.argsort(descending=True, stable=True).tolist()
    rows = []
    for place in [p for p in order if graph.nodes[p].number is None][:top]:
        node = graph.nodes[place]
        at = "" if node.position is None else f"{node.position} {graph.tokens[node.position]}"
        activation = number(node.activation) if node.feature is not None else ""
        share = percent(graph.influence[place].item())
        rows.append((node.id, at, share, activation, graph.label(node)))
    table = _table()
    for column, head in enumerate(heads):
        table.add_column(head, justify="right" if column in (2, 3) else "left", no_wrap=True)
    # A label may be cut; an id that is cut cannot be copied.
    widths = [max(len(head), *(len(row[i]) for row in rows)) + 2 for i, head in enumerate(heads)]
    left = max(20, console().width - sum(widths[:-1]) - 2)
    for *cells, label in rows:
        cut = label if len(label) <= left else f"{label[: left - 1]}…"
        table.add_row(*map(_cell, (*cells, cut)))
    console().print(table)


def _print_claims(graph: "Graph", say: Any) -> None:
    if graph.checked is not None:
        say("\nChecked by perturbing the model, observed beside predicted:")
        table = _table()
        for head in ("", "Pearson", "same sign", "of"):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        agreement = graph.checked.get("agreement", {})
        for name, said in _CHECKS.items():
            if one := agreement.get(name):
                table.add_row(said, number(one["pearson"], 3), percent(one["same_sign"]),
                              str(one["n"]))  # fmt: skip
        console().print(table)
    if graph.stability is not None:
        overlap = [
            f"of {name} {number(one['mean'], 2)}" + (
                "" if one.get("low") is None else
                f" ({number(one['low'], 2)} to {number(one.get('high'), 2)})"
            )
            for name, one in graph.stability.get("jaccard", {}).items()
        ]  # fmt: skip
        say(
            f"\nOver {len(graph.stability.get('prompts', ()))} prompts, the overlap of graphs "
            f"(Jaccard) is {', '.join(overlap) or 'not known'}"
        )


def _print_proposed(graph: "Graph", proposed: Any) -> None:
    out = console()
    if not proposed:
        out.print("\nNo features are alike enough to be proposed as a group.")
        return
    out.print("\nFeatures that are alike; add one with --group:")
    for one in proposed:
        # To be copied to a shell, in which a stranger's label must stay a label.
        said = shlex.quote(_plain(f"{one.label}={','.join(one.ids)}"))
        out.print(f"  --group {said}", markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text of strangers, without what would act in a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _cell(text: str) -> Any:
    from rich.text import Text

    return Text(_plain(text).replace("\n", "⏎"))


def _table() -> Any:
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
