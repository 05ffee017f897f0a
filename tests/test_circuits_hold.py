"""The held model: it gives what the plain one gave, and every weight of a graph is its derivative.

Nothing of how graphs are made is used here: norms, heads and MLPs are held by hooks.
"""

from dataclasses import replace

import pytest
import torch
from transcoded import MODELS, cross_layer, random_model, transcoders

from gemscope.circuits import Kind, Start, trace
from gemscope.circuits._hold import Held, Perturbed, rows_at_once
from gemscope.circuits._replay import Probe, Replay, Write
from gemscope.lm import Edit
from gemscope.sites import Site, Stream

# Longer than the windows of the models that have some.
SHORT = "def area(width):"
SETS = {
    "plain": transcoders,
    "skip": lambda model: transcoders(model, skip=True),
    "gain-free": lambda model: transcoders(model, stream=Stream.MLP_IN_UNSCALED, skip=True),
    "cross-layer": cross_layer,
}
PAIRS = [(name, "skip") for name in MODELS] + [("gemma-3", name) for name in SETS if name != "skip"]


@pytest.fixture(scope="module")
def models():
    """Models in float64: what is left of a difference is what float32 norms and weights round."""
    return {name: random_model(name, torch.float64) for name in MODELS}


def replayed(model, known):
    """The whole graph of a short prompt, and the prompt run again."""
    graph = trace(
        SHORT, list(known), model=model, load=known.__getitem__, node_threshold=1,
        edge_threshold=1,
    )  # fmt: skip
    return graph, Replay.of(graph, model, known.__getitem__)


def held(replay, **options):
    return Held(replay.model, replay.prompt.batch, replay.transcoders, replay.active, **options)


@pytest.mark.parametrize(("family", "kind"), [*PAIRS[:5], ("gemma-2", "gain-free")])
@torch.no_grad()
def test_unchanged_it_gives_what_the_model_gave(models, family, kind):
    model = models[family]
    _, replay = replayed(model, SETS[kind](model))
    sites = [
        Site(layer, stream)
        for layer in range(model.n_layers)
        for stream in (Stream.RESID_PRE, Stream.ATTN_HEADS, Stream.ATTN_OUT, Stream.RESID_MID,
                       Stream.MLP_IN, Stream.MLP_IN_UNSCALED, Stream.MLP_OUT, Stream.RESID_POST)
    ]  # fmt: skip
    run = model.run(SHORT, read=sites)
    found = held(replay, whole=True).run([[], []], sites)
    for site in sites:
        scale = run[site].abs().max()
        assert (found[site] - run[site]).abs().max() < 2e-6 * scale, site
    # Changes alone: there are none.
    for value in held(replay, respond=True).run([[]], sites).values():
        assert not value.any()


@pytest.mark.parametrize(("family", "kind"), PAIRS)
@torch.no_grad()
def test_every_edge_is_a_difference_of_the_held_model(models, family, kind):
    model = models[family]
    graph, replay = replayed(model, SETS[kind](model))
    n = len(graph.nodes)
    dense = torch.zeros(n, n, dtype=torch.float64)
    dense[graph.edges.source.long(), graph.edges.target.long()] = graph.edges.weight.double()
    written = [i for i, node in enumerate(graph.nodes)
               if node.kind not in (Kind.BIAS, Kind.TARGET)]  # fmt: skip
    read = graph.edges.target.unique().tolist()
    assert len(read) > 20
    where = held(replay)
    probes = [replay.probe(graph.nodes[i]) for i in read]
    for some in torch.tensor(written).split(rows_at_once(model, len(replay.prompt))):
        changes = where.probed([replay.writes(graph.nodes[i]) for i in some.tolist()], probes)
        wanted = dense[some][:, read]
        # Weights are kept in float32.
        assert (changes - wanted).abs().max() < 1e-6 * dense.abs().max()
    assert int((dense[written][:, read] != 0).sum()) > 500


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_gradients_are_those_of_the_held_model(models, family, kind):
    model = models[family]
    _, replay = replayed(model, SETS[kind](model))
    seq, d = len(replay.prompt), model.config.hidden_size
    sites = [Site(0, Stream.EMBED), *replay.transcoders.writes]
    zeros = torch.zeros(len(sites), seq, d, dtype=torch.float64, requires_grad=True)
    writes = [Write(site, p, zeros[i, p]) for i, site in enumerate(sites) for p in range(seq)]
    where = held(replay, whole=True)
    generator = torch.Generator().manual_seed(1)
    last = Site(model.n_layers - 1, Stream.RESID_POST)
    for site, final in ((Site(1, Stream.MLP_IN), False), (Site(2, Stream.ATTN_HEADS), False),
                        (Site(1, Stream.ATTN_OUT), False), (last, True)):  # fmt: skip
        vector = torch.randn(model.width(site), generator=generator, dtype=torch.float64)
        position = seq - 2
        probe = Probe(site, position, vector, final)
        (gradient,) = torch.autograd.grad(where.probed([writes], [probe]).sum(), zeros)
        at, frozen = torch.tensor([position]), replay.frozen
        start = frozen.logits(vector[None], at) if final else Start(site, at, vector[None])
        made = {step.site: step.gradient[:, 0] for step in frozen.back(start)}
        for i, one in enumerate(sites):
            wanted = torch.zeros(seq, d, dtype=torch.float64)
            if one in made:
                wanted[: len(made[one])] = made[one]
            error = (gradient[i] - wanted).abs().max()
            assert error < 1e-9 * gradient.abs().max(), (site, one)
        assert gradient[0].abs().max() > 0


@torch.no_grad()
def test_features_respond_by_what_they_read(models):
    """With responses, what is read is the sum over all ways, here of two features' layers."""
    model = models["llama"]
    graph, replay = replayed(model, SETS["skip"](model))
    source = next(n for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 0)
    between = [n for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 1]
    target = replay.probe(next(n for n in graph.nodes if n.kind is Kind.FEATURE and n.layer == 2
                               and n.position == len(replay.prompt) - 1))  # fmt: skip
    where, writes = held(replay), replay.writes(source)
    direct = where.probed([writes], [target])[0, 0]
    moves = where.probed([writes], [replay.probe(n) for n in between])[0]
    passed = where.probed([replay.writes(n) for n in between], [target])[:, 0]
    activations = torch.tensor([n.activation for n in between], dtype=torch.float64)
    wanted = direct + (moves / activations * passed).sum()
    found = held(replay, respond=True).probed([writes], [target])[0, 0]
    assert abs(found - wanted) < 1e-6 * abs(direct)
    assert abs(found - direct) > 1e-3 * abs(direct)


@pytest.mark.parametrize("family", ["gemma-2", "llama with biases"])
@torch.no_grad()
def test_a_perturbed_model_is_the_model_with_an_edit(models, family):
    model = models[family]
    _, replay = replayed(model, SETS["gain-free"](model))
    site, place = replay.transcoders.writes[1], 3
    vector = torch.randn(model.config.hidden_size, dtype=torch.float64)

    def added(tokens, x):
        out = x.clone()
        out[tokens.positions == place] += vector
        return out

    reads = [Site(2, Stream.RESID_POST), Site(2, Stream.MLP_IN_UNSCALED)]
    run = model.run(replay.prompt.batch, read=reads, logits=True,
                    edits=[Edit(site, site, added, placed=True)])  # fmt: skip
    plain = Perturbed(model, replay.prompt.batch)
    found = plain.run([[], [Write(site, place, vector)]], reads)
    untouched = model.run(replay.prompt.batch, read=reads)
    for one in reads:
        assert torch.allclose(found[one][1:], run[one], rtol=1e-6, atol=1e-6)
        assert torch.allclose(found[one][:1], untouched[one], rtol=1e-6, atol=1e-6)
    assert (found[reads[0]][1, :place] == found[reads[0]][0, :place]).all()
    # A logit without its cap, less the mean of all.
    u = model.weights.unembedding
    probe = Probe(reads[0], len(replay.prompt) - 1, u[7] - u.mean(0), final=True)
    logits = run.logits[0, -1]
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.atanh(logits / cap)
    read = plain.probed([[Write(site, place, vector)]], [probe])[0, 0]
    assert float(read) == pytest.approx(float(logits[7] - logits.mean()), rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_what_is_written_is_read_at_the_same_site(models):
    model = models["gemma-3"]
    _, replay = replayed(model, SETS["plain"](model))
    vector = torch.ones(model.config.hidden_size, dtype=torch.float64)
    for site in (replay.transcoders.writes[2], Site(0, Stream.EMBED)):
        at = site if site.stream is Stream.MLP_OUT else Site(0, Stream.RESID_PRE)
        writes = [Write(site, 2, vector), Write(site, 2, vector)]
        (changes,) = held(replay).run([writes], [at]).values()
        assert (changes[0, 2] == 2).all()
        assert not changes[0, :2].any()


@torch.no_grad()
def test_small_changes_survive_bfloat16():
    model = random_model("gemma-2", torch.bfloat16)
    _, replay = replayed(model, transcoders(model, skip=True))
    node = next(n for n in replay.graph.nodes if n.kind is Kind.FEATURE and n.layer == 0)
    probe = replay.probe(replay.graph.nodes[-1])
    small, large = (
        held(replay).probed([[replace(w, vector=w.vector * step) for w in replay.writes(node)]],
                            [probe])[0, 0] / step
        for step in (2.0**-12, 1.0)
    )  # fmt: skip
    assert small == large != 0


def test_hooks_are_gone_whatever_happens(models):
    model = models["gemma-2"]
    _, replay = replayed(model, SETS["plain"](model))
    where = held(replay)
    with pytest.raises(RuntimeError):
        where.run([[Write(replay.transcoders.writes[0], 99, torch.ones(3))]], [])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    assert sum(hooks) == 0
