"""What a circuit leaves in its folder: JSON, the figure, and a short report to read."""

import json
from pathlib import Path

from gemscope.activations import write_whole
from gemscope.errors import InputError

from ._sparse_curves import Spread
from ._sparse_figure import draw_curves
from ._sparse_found import Circuit, CircuitNode

PARTS = "parts"
"""Folder, in a circuit's, of what has been computed."""
_NODES, _EDGES = 30, 30
"""Of each, how many the report shows."""


def prepare_circuit(folder: Path) -> Path:
    """Make the folder of a circuit, before anything is computed for it; where its parts go.

    Raises:
        InputError: It cannot be made, or is a file.
    """
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be a circuit's folder: {error.strerror}; name another with --out"
        ) from None
    return folder / PARTS


def save_circuit(circuit: Circuit, folder: Path) -> None:
    """Write `circuit.json`, `circuit.md` and `curves.png` into `folder`."""
    prepare_circuit(folder)
    text = json.dumps(circuit.json(), indent=1, ensure_ascii=False)
    part = folder / "curves.part.png"
    draw_curves(circuit, part)
    try:
        write_whole(folder / "circuit.json", text.encode())
        part.replace(folder / "curves.png")
        write_whole(folder / "circuit.md", circuit_report(circuit).encode())
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None


def circuit_report(circuit: Circuit) -> str:
    """The report, in Markdown."""
    config, curves = circuit.config, circuit.curves
    how = {"corrupted": "corrupted prompts", "zero": "zero", "mean": f"mean over {config.mean}"}[
        config.ablation
    ]
    lines = [
        f"# {_plain(config.task or 'A circuit')}", "",
        f"Model {circuit.model}; {len(circuit.addresses)} dictionaries; {len(circuit.examples)} "
        f"examples, {len(circuit.held_out)} held out. Ablation: {_plain(how)}. Effects: "
        f"{config.method}"
        + (f", {config.steps} steps" if config.method == "integrated" else "")
        + f". Nodes at {'single' if config.aggregate == 'none' else 'all'} positions"
        + ("." if config.aggregate == "none" else " together."), "",
        "| example | metric | clean | everything ablated |", "|---|---|---|---|",
        *(f"| `{_plain(one.text)}` | `{_plain(one.metric)}` | {one.clean:.3f} | {one.empty:.3f} |"
          for one in circuit.examples), "",
        "## How well it stands for the model", "", "![Curves](curves.png)", "",
        f"Measured on {curves.prompts} {'held-out' if curves.held_out else 'of the same'} prompts; "
        f"in brackets 95% over prompts, and of {curves.random_circuits} random circuits.", "",
        "| nodes | faithfulness | random | completeness | random |", "|---|---|---|---|---|",
        *(f"| {p.size:,} | {shown_spread(p.faithfulness)} | {shown_spread(p.random_faithfulness)} "
          f"| {shown_spread(p.completeness)} | {shown_spread(p.random_completeness)} |"
          for p in curves.points), "",
        "## Nodes", "", _counted(circuit), "", _agreed(circuit), "",
        "| node | label | effect | exact |", "|---|---|---|---|",
        *(_row(one) for one in circuit.nodes[:_NODES]), "",
        "## Edges", "",
        f"{len(circuit.edges):,} of at least {config.edge_threshold:g}; the largest:", "",
        "| from | to | weight |", "|---|---|---|",
        *(f"| `{_plain(e.source)}` | `{_plain(e.target)}` | {e.weight:+.4g} |"
          for e in circuit.edges[:_EDGES]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def shown_spread(spread: Spread, digits: int = 2) -> str:
    """`0.58 [0.53, 0.63]`."""
    value = _number(spread.value, digits)
    if spread.low is None or spread.high is None:
        return value
    low, high = (_number(end, digits) for end in (spread.low, spread.high))
    return value if low == high == value else f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    # What rounds to nothing has no sign.
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _counted(circuit: Circuit) -> str:
    kept, config = len(circuit.nodes), circuit.config
    said = (f"{circuit.above:,} of {circuit.count:,} nodes that change have an effect of at least "
            f"{config.node_threshold:g}")  # fmt: skip
    if kept < circuit.above:
        said += f"; the {kept:,} largest are kept (max_nodes)"
    return f"{said}. Effects are changes of the metric when a node is ablated."


def _agreed(circuit: Circuit) -> str:
    a = circuit.agreement
    pearson = "-" if a["pearson"] is None else f"{a['pearson']:.2f}"
    sign = "-" if a["same_sign"] is None else f"{a['same_sign']:.0%}"
    return (f"Of the {a['nodes']} largest estimates the exact effect was measured: Pearson "
            f"{pearson}, same sign {sign}.")  # fmt: skip


def _row(one: CircuitNode) -> str:
    exact = "" if one.exact is None else f"{one.exact:+.3f}"
    return (f"| `{_plain(one.node.id)}` | {_plain(one.label or '')} | "
            f"{shown_spread(one.effect, 3)} | {exact} |")  # fmt: skip


def _plain(text: str) -> str:
    """Text of others in one cell of a table."""
    made = text.replace("\n", "⏎").replace("\r", " ").replace("`", "'").replace("|", "\\|")
    return made.replace("<", "&lt;").replace(">", "&gt;")
