"""`gemscope circuit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._show import console, number, percent, print_json, token_progress

if TYPE_CHECKING:
    from gemscope.circuits import Circuit

_SHOWN = 12
"""Nodes in the summary."""


def circuit_command(
    config: Annotated[Path, typer.Argument(help="A YAML file: dictionaries, examples, thresholds.")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep circuit.json, circuit.md and curves.png there, and what is done so far: a run that was stopped goes on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Find a circuit of SAE features, and measure how well it stands for the model."""
    from gemscope import circuits, lm

    chosen = circuits.read_circuit_config(config)

    def load_model(name: str) -> "lm.LanguageModel":
        return lm.load_model(name, device=device, dtype=dtype)

    parts = None if out is None else circuits.prepare_circuit(out)
    units = {"effects": "prompts", "exact effects": "prompts", "edges": "prompts",
             "held out": "prompts", "curves": "circuits"}  # fmt: skip
    with token_progress(units) as progress:
        found = circuits.sparse_circuit(
            chosen, load_model=load_model, parts=parts, progress=progress
        )
        if out is not None:
            circuits.save_circuit(found, out)
    if json:
        print_json(found.json())
    else:
        _print(found, out)


def _table(*heads: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    return table


def _print(found: "Circuit", out: Path | None) -> None:
    from gemscope.circuits import shown_spread

    to, config, curves = console(), found.config, found.curves
    to.print(
        f"{config.task or 'Circuit'}: {len(found.addresses)} dictionaries, "
        f"{len(found.examples)} examples; metric {number(curves.whole)}, "
        f"{number(curves.empty)} with everything ablated",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    cut = f"; the {len(found.nodes):,} largest are kept" if len(found.nodes) < found.above else ""
    to.print(
        f"{found.count:,} nodes change, {found.above:,} by {config.node_threshold:g} or more{cut}; "
        f"{len(found.edges):,} edges of {config.edge_threshold:g} or more\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = _table("nodes", "faithfulness", "random", "completeness", "random")
    for point in curves.points:
        mark = "*" if found.nodes and point.size == len(found.nodes) else ""
        table.add_row(
            f"{point.size:,}{mark}",
            *(shown_spread(one) for one in (point.faithfulness, point.random_faithfulness,
                                            point.completeness, point.random_completeness)),
        )  # fmt: skip
    to.print(table)
    where = "held-out prompts" if curves.held_out else "prompts the circuit was found on"
    said = "; *: the nodes above the threshold" if found.nodes else ""
    to.print(f"\nOn {curves.prompts} {where}{said}\n")
    a = found.agreement
    to.print(
        f"The {a['nodes']} largest estimates and exact effects: Pearson {number(a['pearson'], 3)}, "
        f"Spearman {number(a['spearman'], 3)}, same sign {percent(a['same_sign'])}\n"
    )
    _print_nodes(found)
    if out is not None:
        to.print(f"\nThe report: {out / 'circuit.md'}", markup=False, soft_wrap=True)


def _print_nodes(found: "Circuit") -> None:
    from rich.text import Text

    labels = any(one.label for one in found.nodes)
    table = _table("node", "estimate", "exact", *(["label"] if labels else []))
    some = found.nodes[:_SHOWN]
    if some:
        # An address that is cut cannot be copied.
        table.columns[0].min_width = max(len(one.node.id) for one in some)
    for one in some:
        exact = "-" if one.exact is None else f"{one.exact:+.4g}"
        table.add_row(
            one.node.id, f"{one.effect.value:+.4g}", exact,
            *([Text(one.label or "", overflow="ellipsis")] if labels else []),
        )  # fmt: skip
    console().print(table)
    if len(found.nodes) > len(some):
        console().print(f"and {len(found.nodes) - len(some):,} more")
