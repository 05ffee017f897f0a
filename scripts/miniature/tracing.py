"""Three questions to the miniature, answered by graphs and circuits that are checked.

    python scripts/miniature/tracing.py --work build/miniature

Writes `docs/tracing-miniature.md` and `docs/tracing/N.png`; the labels are those of the catalog
store in `WORK/catalog`, which `catalog.py` makes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gemscope import circuits
from gemscope.circuits import Graph, Kind
from gemscope.features import Store
from gemscope.lm import LanguageModel, load_model

DOCS = Path(__file__).parents[2] / "docs"
SET = "miniature/transcoder_all/*_big_affine"
CHECKED, PATHS, SHOWN = 40, 5, 0.6
SIZES = [10, 20, 50, 100, 200, 500, 1000]
HEAD = """# Three graphs of the miniature

Each answers why the miniature goes on as it does after a prompt, with the transcoders
`{set}`. [tracing.md](tracing.md) says what the numbers mean,
[circuit.md](circuit.md) how the curves of SAE circuits are made. Nothing is picked by hand but the
prompts. Made by `python scripts/miniature/tracing.py --work build/miniature`.
"""


@dataclass(frozen=True)
class Question:
    title: str
    prompt: str
    target: str
    others: tuple[str, ...]
    """Prompts of the same kind, for stability and as examples of the SAE circuit."""
    metric: str


QUESTIONS = (
    Question(
        "A closing bracket",
        "        if not isinstance(value, str",
        "difference:):: if",
        ("        if not isinstance(value, int", "        if not isinstance(name, bytes",
         "        if not isinstance(path, str", "        if not hasattr(self, name",
         "        if not hasattr(self, key", "        if not callable(value"),
        "difference:):: if",
    ),
    Question(
        "`(self` after `def` in a class",
        "class Reader:\n    def close",
        "difference:(self:(",
        ("class Writer:\n    def close", "class Reader:\n    def read",
         "class Pool:\n    def start", "class Parser:\n    def write",
         "class Buffer:\n    def flush", "class Server:\n    def run"),
        "difference:(self:(",
    ),
    Question(
        "Indentation after a docstring",
        'class Reader:\n    def close(self):\n        """Close the file."""',
        "difference:\n       :\n   ",
        ('class Writer:\n    def read(self):\n        """Read the file."""',
         'class Pool:\n    def start(self):\n        """Start the pool."""',
         'class Server:\n    def run(self):\n        """Run the server."""',
         'class Parser:\n    def write(self):\n        """Write the text."""',
         'class Reader:\n    def name(self):\n        """Return the name."""',
         'class Buffer:\n    def clear(self):\n        """Clear the buffer."""'),
        "difference:\n       :\n   ",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    store, model = Store.open(given.work / "catalog"), load_model("miniature")
    folder = DOCS / "tracing"
    folder.mkdir(exist_ok=True)
    parts = [HEAD.format(set=SET)]
    for number, question in enumerate(QUESTIONS, 1):
        parts.append(_answered(question, number, model, store, folder, given.work))
        print(question.title, flush=True)
    (DOCS / "tracing-miniature.md").write_text("\n".join(parts), "utf-8")


def _answered(
    question: Question, number: int, model: LanguageModel, store: Store, folder: Path, work: Path
) -> str:
    graph = circuits.trace(question.prompt, [SET], model=model, targets=[question.target])
    graph = circuits.check(graph, model, CHECKED)
    graph = circuits.stability(graph, model, question.others)
    graph = circuits.labelled(graph, [store])
    picture = folder / f"{number}.png"
    circuits.draw(circuits.pruned(graph, nodes=SHOWN, edges=0.9), picture)
    _small(picture)
    curves = folder / f"{number}-curves.png"
    circuit = _circuit(question, model, work / f"circuit_{number}")
    circuits.draw_curves(circuit, curves)
    _small(curves)
    return "\n".join(
        [_said(graph, question, number, picture), _paths(graph), _checks(graph), _returns(graph),
         _curves(circuit, number, curves)]
    )  # fmt: skip


def _small(picture: Path) -> None:
    image = Image.open(picture).convert("RGB")
    image.thumbnail((1100, 1100))
    image.quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _said(graph: Graph, question: Question, number: int, picture: Path) -> str:
    target = graph.targets[0]
    kinds = {k: int(graph.kinds(k).sum()) for k in (Kind.FEATURE, Kind.ERROR)}
    return f"""
## {number}. {question.title}

{_code(question.prompt)}

What is explained is the logit of {_two(target.label)}: {target.value:.2f}. The books close to
{graph.books.error:.0e}. Replacement {graph.scores.replacement:.2f}, completeness
{graph.scores.completeness:.2f}; {kinds[Kind.FEATURE]} features and {kinds[Kind.ERROR]} errors carry
80% of the influence, and the picture those that carry {SHOWN:.0%}.

![The graph of the prompt: tokens below, the target above](tracing/{picture.name})
"""


def _two(label: str) -> str:
    one, two = label.split(" − ")
    return f"`{one}` less that of `{two}`"


def _paths(graph: Graph) -> str:
    lines = [
        "The strongest paths through features, with the share of the influence each carries:",
        "",
    ]
    paths = [p for p in circuits.strongest_paths(graph, 60) if len(p.ids) > 2][:PATHS]
    for path in paths:
        steps = [_cut(graph, one, weight) for one, weight in zip(path.ids, (None, *path.weights),
                                                                strict=True)]  # fmt: skip
        lines.append(f"- {path.share:.1%}: {' → '.join(steps)}")
    return "\n".join([*lines, ""])


def _cut(graph: Graph, one: str, weight: float | None) -> str:
    """A step of a path; labels are cut, the explorer has all of them."""
    node = graph.nodes[graph.place(one)]
    label = graph.label(node)
    at = "" if node.position is None or node.number is not None else f" ({node.position})"
    name = f"{node.layer}.{node.feature}: " if node.kind is Kind.FEATURE else ""
    added = "" if weight is None else f"{weight:+.3g} "
    return f"{added}{name}{label[:50]}{'…' if len(label) > 50 else ''}{at}"


def _checks(graph: Graph) -> str:
    assert graph.checked is not None
    rows = {
        "frozen": "edges, all else held", "model": "edges, in the real model",
        "model_feature": "— from features", "model_error": "— from errors",
        "frozen_nodes": "nodes ablated, frozen model",
        "model_nodes": "nodes ablated, real model",
    }  # fmt: skip
    lines = [f"The {CHECKED} strongest edges from features and errors, and nodes, perturbed:", "",
             "| | Pearson | same sign | of |", "|---|--:|--:|--:|"]  # fmt: skip
    for name, said in rows.items():
        one = graph.checked["agreement"].get(name)
        if one:
            r = "–" if one["pearson"] is None else f"{one['pearson']:.2f}"
            lines.append(f"| {said} | {r} | {one['same_sign']:.0%} | {one['n']} |")
    return "\n".join([*lines, ""])


def _returns(graph: Graph) -> str:
    assert graph.stability is not None
    overlap = graph.stability["jaccard"]
    parts = [
        f"{overlap[name]['mean']:.2f} [{overlap[name]['low']:.2f}, {overlap[name]['high']:.2f}] of "
        f"{said}"
        for name, said in (("nodes", "nodes"), ("features", "features"), ("edges", "edges"))
    ]
    lasting = sorted(
        (n for n in graph.stability["nodes"]
         if n["key"].startswith("feature") and n["id"] is not None),
        key=lambda n: -n["share"],
    )  # fmt: skip
    always = [n for n in lasting if n["share"] == 1]
    names = []
    for one in sorted(always, key=lambda n: -graph.influence[graph.place(n["id"])].item())[:4]:
        node = graph.nodes[graph.place(one["id"])]
        label = graph.label(node)
        names.append(f"{node.layer}.{node.feature} ({label[:70]}{'…' if len(label) > 70 else ''})")
    text = (
        f"Traced again for {len(graph.stability['prompts'])} prompts of the same kind, graphs "
        f"overlap (Jaccard) by {', '.join(parts)}. Of {len(lasting)} features "
        f"{len(always)} return in every one"
    )
    return f"{text}, first of all {'; '.join(names)}.\n" if names else f"{text}.\n"


def _circuit(question: Question, model: LanguageModel, parts: Path) -> circuits.Circuit:
    prompts = (question.prompt, *question.others)
    half = (len(prompts) + 1) // 2
    config = circuits.CircuitConfig(
        task=question.title.replace("`", ""),
        dictionaries=tuple(
            f"miniature/resid_post_all/layer_{n}_width_384_l0_small" for n in range(model.n_layers)
        ),
        examples=tuple(circuits.CircuitExample(clean=one) for one in prompts[:half]),
        held_out=tuple(circuits.CircuitExample(clean=one) for one in prompts[half:]),
        metric=question.metric, ablation="mean", mean="miniature", method="integrated",
        aggregate="positions", sizes=tuple(SIZES),
    )  # fmt: skip
    parts.mkdir(parents=True, exist_ok=True)
    return circuits.sparse_circuit(config, model=model, parts=parts)


def _curves(circuit: circuits.Circuit, number: int, curves: Path) -> str:
    lines = [
        f"A circuit of SAE features for the same (the residual streams of six layers, found on "
        f"{len(circuit.examples)} of these prompts, measured on the other {len(circuit.held_out)}; "
        "everything else at its mean):", "",
        "| nodes | faithfulness | random | completeness | random |", "|--:|---|---|---|---|",
    ]  # fmt: skip
    for p in circuit.curves.points:
        if p.size in SIZES:
            spreads = (p.faithfulness, p.random_faithfulness, p.completeness,
                       p.random_completeness)  # fmt: skip
            cells = [circuits.shown_spread(one) for one in spreads]
            lines.append(f"| {p.size:,} | {' | '.join(cells)} |")
    lines += ["", f"![Faithfulness and completeness by size](tracing/{curves.name})", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
