"""Where gemscope's attribution graphs and those of circuit-tracer 0.5.0 agree, and where they part.

`golden/circuit_tracer.json` holds what circuit-tracer made of the models and transcoders here, as
`benchmarks/peers/circuits.py` asked it. Edges between features, errors, tokens and logits are the
same numbers, and so are influence, scores and what pruning keeps. Three things differ:

- It has no nodes for biases and for what MLPs write at BOS. Here they are sources, left out of
  influence and scores; nothing of this changes another edge.
- At BOS, which transcoders were not trained on, it still takes a transcoder's skip connection for
  the MLP. Here the MLP's whole output is a constant there, so that the token BOS says less.
- Of Gemma 3 it takes token vectors before they are scaled by the root of the model's width, and
  edges from tokens come out smaller by that root. The derivative of the model says what is right.

Probabilities of targets weigh influence; there they sum to what they do, here to 1.
To make the record again, where `.venv-circuits` has circuit-tracer (`make bench` sets it up):
`.venv/bin/python tests/test_peer_circuits.py`.
"""

import json
import os
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from peers.circuit_artefacts import PROMPT, make
from safetensors.torch import load_file
from torch.nn import functional

from gemscope import miniature
from gemscope.circuits import CONSTANTS, Kind, trace
from gemscope.hub import load_sae
from gemscope.lm import load_model

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv-circuits" / "bin" / "python"
GOLDEN = Path(__file__).parent / "golden" / "circuit_tracer.json"
ROUNDING = 2.0**-24
"""Of one operation in float32, relative."""
THRESHOLDS = {"nodes": 0.8, "edges": 0.98}
CASES = {
    "plain": {},
    "skip": {"skip": True, "seed": 2},
    "wider": {"layers": 5, "d": 64, "window": 3, "features": 48, "l0": 3.0, "seed": 1},
}
ROWS = {"plain": None, "skip": 3, "miniature": 1}
"""What is in the record, and how many targets of it; of `plain`, everything."""
GEMMA_3 = [f"miniature/transcoder_all/layer_{n}_width_192_l0_small_affine" for n in range(6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `model` and `layer_N` for each case."""
    return made_in(tmp_path_factory.mktemp("circuits"))


def made_in(root):
    for name, sizes in CASES.items():
        make(root / name, **sizes)
    (root / "miniature").mkdir()
    (root / "miniature" / "model").symlink_to(miniature.MODEL)
    for layer, address in enumerate(GEMMA_3):
        place = miniature.MODEL.parent / "scope" / address.removeprefix("miniature/")
        (root / "miniature" / f"layer_{layer}").symlink_to(place)
    return root


class Ours:
    """Our graph of a case, unpruned but for what leads nowhere, under the names of the record."""

    def __init__(self, root, case, **thresholds):
        self.model = load_model("miniature" if case == "miniature" else str(root / case / "model"))
        self.addresses = GEMMA_3 if case == "miniature" else [
            str(root / case / f"layer_{n}") for n in range(self.model.n_layers)
        ]  # fmt: skip
        given = {f"{name[:-1]}_threshold": 1 for name in THRESHOLDS} | thresholds
        self.graph = g = trace(PROMPT, self.addresses, model=self.model, **given)
        self.ids = [
            f"target.{g.targets[n.number].token}" if n.kind is Kind.TARGET else n.id
            for n in g.nodes
        ]
        self.shared = {i for i, n in zip(self.ids, g.nodes, strict=True) if n.kind not in CONSTANTS}
        columns = zip(g.edges.target.tolist(), g.edges.source.tolist(), g.edges.weight.tolist(),
                      strict=True)  # fmt: skip
        self.edges = {
            (self.ids[t], self.ids[s]): w for t, s, w in columns if self.ids[s] in self.shared
        }
        self.influence = dict(zip(self.ids, g.influence.tolist(), strict=True))


def ids_of(case, root=None):
    model = "miniature" if case == "miniature" else str(root / case / "model")
    return load_model(model).tokens(PROMPT).ids[0].tolist()


# circuit-tracer


def asked(root, case, out):
    """Have circuit-tracer make the graph of a case; what it says, and the graph under our names."""
    command = [PEER, ROOT / "benchmarks" / "peers" / "circuits.py", root / case]
    ids = ids_of(case, root)
    line = {"ids": ids, "max_features": 7_500, **THRESHOLDS, "batch": 64, "out": str(out)}
    done = subprocess.run(
        [*command, "--threads", "1"], input=json.dumps(line) + "\n", capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started, answer = map(json.loads, done.stdout.splitlines())
    return {**started, **answer}, graph_of(load_file(out), len(ids))


def graph_of(found, seq):
    """A graph of circuit-tracer, and what its nodes are called here."""
    features, tokens = found["features"].tolist(), found["tokens"].tolist()
    layers = (len(found["influence"]) - len(features) - len(tokens)) // seq - 1
    names = [f"feature.{layer}.{feature}.{at}" for layer, at, feature in features]
    names += [f"error.{layer}.{at}" for layer in range(layers) for at in range(seq)]
    names += [f"embedding.{at}" for at in range(seq)] + [f"target.{token}" for token in tokens]
    weights = found["adjacency"]
    return {
        "names": names,
        "edges": [[t, s, weights[t, s].item()] for t, s in weights.nonzero().tolist()],
        "influence": found["influence"].tolist(),
        "probabilities": found["probabilities"].tolist(),
        "kept_nodes": found["nodes"].nonzero()[:, 0].tolist(),
        "kept_edges": found["edges"].nonzero().tolist(),
        "scores": found["scores"].tolist(),
    }


def part_of(graph, targets):
    """What of a graph is in the record: all, or the rows of the likeliest of its targets."""
    if targets is None:
        return graph
    names = graph["names"]
    first = [n for n, name in enumerate(names) if name.startswith("target.")][:targets]
    return {"names": names, "edges": [edge for edge in graph["edges"] if edge[0] in first]}


@cache
def golden():
    return json.loads(GOLDEN.read_text("utf-8"))["graphs"]


def known(graph):
    names = graph["names"]
    return {(names[t], names[s]): w for t, s, w in graph["edges"]}


def off_by(ours, theirs, *, besides=()):
    """The largest difference of edges of rows that both have, in units of what rounding may make.

    A gradient passes four products of d numbers a layer. Their roundings have no common sign and
    add up like the root of their number, of the size of what a row sums.
    """
    d, layers = ours.model.config.hidden_size, ours.model.n_layers
    size: dict[str, float] = {}
    for (target, _), weight in theirs.items():
        size[target] = size.get(target, 0.0) + abs(weight)
    rows = {t for t, _ in ours.edges}
    assert rows >= {name for name in size if name.startswith("target.")}
    pairs = {p for p in theirs.keys() | ours.edges if p[0] in rows & size.keys()}
    unit = ROUNDING * (4 * layers * d) ** 0.5
    return max(
        abs(theirs.get(p, 0.0) - ours.edges.get(p, 0.0)) / (unit * size[p[0]])
        for p in pairs if p[1] not in besides
    )  # fmt: skip


def check_whole(ours, graph, kept):
    """Nodes, edges, influence, scores and pruning of two whole graphs are the same."""
    assert off_by(ours, known(graph)) < 1
    names, shares = graph["names"], dict(zip(graph["names"], graph["influence"], strict=True))
    leading = {name for name, share in shares.items() if share > 0}
    targets = {name for name in ours.ids if name.startswith("target.")}
    assert ours.shared == leading | targets
    total = sum(graph["probabilities"])
    # Shares are float32 there, summed over as many paths as there are layers.
    for name in leading:
        assert abs(shares[name] / total - ours.influence[name]) < 1e-5, name
    found = ours.graph.scores
    assert (found.replacement, found.completeness) == pytest.approx(graph["scores"], abs=1e-5)
    assert {names[n] for n in graph["kept_nodes"]} == kept.shared
    assert {(names[t], names[s]) for t, s in graph["kept_edges"]} == kept.edges.keys()


def thresholds():
    return {f"{name[:-1]}_threshold": share for name, share in THRESHOLDS.items()}


# What is right


def of_tokens(ours, *, held_at_bos):
    """Edges from tokens into the likeliest target, by the derivative of transformers' own model.

    Attention patterns, denominators of norms and outputs of MLPs are constants, but for the skip
    connections of transcoders; at BOS these too where `held_at_bos`.
    """
    (node,) = [n for n in ours.graph.nodes if n.number == 0]
    model = ours.model.hf
    module = __import__(type(model).__module__, fromlist=["_"])
    norm = next(v for n, v in vars(module).items() if n.endswith("RMSNorm"))
    counted = torch.ones(len(ours.graph.token_ids), 1)
    counted[0] = 0.0 if held_at_bos else 1.0
    handles = []
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(model.config, "_attn_implementation", "eager")
        patch.setattr(functional, "softmax", lambda x, dim=-1, **_: x.softmax(dim).detach())
        patch.setattr(norm, "_norm", lambda self, x: x * torch.rsqrt(
            x.square().mean(-1, keepdim=True) + self.eps).detach())  # fmt: skip
        for block, address in zip(model.model.layers, ours.addresses, strict=True):
            skip, seen = load_sae(address).skip, {}
            handles += [
                block.pre_feedforward_layernorm.register_forward_hook(partial(_keep, seen)),
                block.post_feedforward_layernorm.register_forward_hook(
                    partial(_linear, seen, skip, counted)
                ),
            ]
        x = model.model.embed_tokens(torch.tensor([ours.graph.token_ids])).detach()
        x.requires_grad_()
        out = model.model(inputs_embeds=x, use_cache=False).last_hidden_state[0, node.position]
        u = model.lm_head.weight
        (g,) = torch.autograd.grad(out @ (u[ours.graph.targets[0].token] - u.mean(0)), x)
    for handle in handles:
        handle.remove()
    return (g * x.detach())[0].sum(-1).tolist()


def _keep(seen, _module, _inputs, out):
    seen["x"] = out


def _linear(seen, skip, counted, _module, _inputs, out):
    passed = 0.0 * seen["x"] if skip is None else (seen["x"] @ skip.float()) * counted
    return passed + (out - passed).detach()


def rows_of(ours, edges):
    """Edges from tokens into the likeliest target."""
    target = f"target.{ours.graph.targets[0].token}"
    return [edges[target, f"embedding.{at}"] for at in range(len(ours.graph.token_ids))]


def test_graphs_agree(made):
    ours = Ours(made, "plain")
    check_whole(ours, golden()["plain"], Ours(made, "plain", **thresholds()))
    right = of_tokens(ours, held_at_bos=True)
    assert rows_of(ours, ours.edges) == pytest.approx(right, abs=1e-5 * max(map(abs, right)))


def test_a_skip_connection_stands_for_no_mlp_at_bos(made):
    ours, theirs = Ours(made, "skip"), known(golden()["skip"])
    assert off_by(ours, theirs, besides={"embedding.0"}) < 1
    assert off_by(ours, theirs) > 100
    for edges, held in ((ours.edges, True), (theirs, False)):
        right = of_tokens(ours, held_at_bos=held)
        assert rows_of(ours, edges) == pytest.approx(right, abs=1e-5 * max(map(abs, right)))


def test_tokens_of_gemma_3_are_scaled(made):
    ours, theirs = Ours(made, "miniature"), known(golden()["miniature"])
    tokens = {f"embedding.{at}" for at in range(len(ours.graph.token_ids))}
    assert off_by(ours, theirs, besides=tokens) < 1
    root = ours.model.config.hidden_size**0.5
    for edges, held, times in ((ours.edges, True, 1), (theirs, False, root)):
        right = of_tokens(ours, held_at_bos=held)
        found = [times * weight for weight in rows_of(ours, edges)]
        assert found == pytest.approx(right, abs=1e-5 * max(map(abs, right)))


# circuit-tracer itself

alone = pytest.mark.skipif(
    not PEER.is_file(), reason="no .venv-circuits with circuit-tracer: `make bench` makes it"
)


@pytest.mark.slow
@alone
@pytest.mark.parametrize("case", ROWS)
def test_circuit_tracer_still_says_what_the_record_says(made, tmp_path, case):
    told, graph = asked(made, case, tmp_path / "graph.safetensors")
    assert told["versions"]["circuit-tracer"] == "0.5.0"
    record, again = known(golden()[case]), known(part_of(graph, ROWS[case]))
    assert record.keys() == again.keys()
    assert [*record.values()] == pytest.approx([*again.values()], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@alone
def test_larger_graphs_agree(made, tmp_path):
    _, graph = asked(made, "wider", tmp_path / "graph.safetensors")
    check_whole(Ours(made, "wider"), graph, Ours(made, "wider", **thresholds()))


def record():
    """Ask circuit-tracer, and write the record."""
    with tempfile.TemporaryDirectory() as place:
        root = made_in(Path(place))
        found, graphs = {}, {}
        for case, targets in ROWS.items():
            told, graph = asked(root, case, root / "graph.safetensors")
            found, graphs[case] = told["versions"], part_of(graph, targets)
    text = json.dumps({"versions": found, "graphs": graphs})
    # Eight digits say it to less than float32 rounds.
    short = json.loads(text, parse_float=lambda number: float(f"{float(number):.8g}"))
    text = json.dumps(short, separators=(",", ":")).replace('},"', '},\n"').replace('],"', '],\n"')
    GOLDEN.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    hf.utils.logging.disable_progress_bar()
    record()
