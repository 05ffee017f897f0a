"""Finetuning: from an artefact there is, and on what the model makes of reconstructions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_steps import Recorder
from training import SAE, Held, advanced, config, weights

from gemscope.corpus import contexts, read_text
from gemscope.hub import build, catalog, load_sae
from gemscope.sites import Site
from gemscope.train import Trainer, train
from gemscope.train import _run as run_module
from gemscope.train._end_to_end import ThroughStream

SITE = Site.parse("3.resid_post")


@pytest.fixture(scope="module")
def rows(miniature):
    documents = list(read_text("miniature"))[:2]
    return list(contexts(documents, miniature.tokenizer, length=32))[:60]


@pytest.fixture(scope="module")
def read(miniature, rows):
    """Activations of the model where the bundled dictionaries read and write."""
    sites = [Site.parse(s) for s in ("3.resid_post", "3.mlp_in", "3.mlp_out")]
    stream = [ThroughStream(miniature, rows, s, batch=1_200, seed=0) for s in sites]
    return {s: x.sample(1_200)[s] for s, x in zip(sites, stream, strict=True)}


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_the_first_step_is_that_of_the_artefact(kind, entries, read, miniature, tmp_path):
    site = {"sae": "3.resid_post", "transcoder": "3.mlp_in"}[kind]
    entry = next(e for e in entries if e.kind == kind and str(e.reads) == site)
    start = {"name": "x", "reads": str(entry.reads), "writes": str(entry.writes),
             "d_sae": entry.d_sae, "l0": entry.l0, "affine": entry.affine,
             "start": entry.address}  # fmt: skip
    chosen = config(tmp_path / "run", start)
    run = Trainer(chosen, Held(read, 512), run_module._starts(chosen, miniature))
    batch = next(run.source.batches())
    (measured,) = run.advance(batch)
    (learner,) = run.learners
    sae = build(entry)
    x, y = batch.values[entry.reads], batch.values[entry.writes]
    code = sae.encode(x)
    error = float((sae.reconstruct(x) - y).double().square().sum(1).mean())
    # 257 roundings in a pre-activation move few of them across a threshold, and no more.
    assert measured.error * learner.scales.c_out[0] ** 2 == pytest.approx(error, rel=1e-3)
    assert measured.l0 == pytest.approx(float(code.counts.double().mean()), rel=1e-3)


def test_what_was_trained_goes_on_where_it_stopped(miniature, tmp_path):
    """From a folder: a step at a rate of nothing gives the artefact back, up to rounding."""
    first = train(config(tmp_path / "first", data__tokens=8 * 128), model=miniature)
    again = SAE | {"name": "again", "start": str(first / "sae"), "optimizer": {"lr": 1e-12}}
    second = train(config(tmp_path / "second", again, data__tokens=2 * 128), model=miniature)
    a, b = weights(first / "sae"), weights(second / "again")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert load_sae(str(second / "again")).reads == load_sae(str(first / "sae")).reads


def test_whole_contexts_come_in_the_same_order_again(miniature, rows):
    stream = ThroughStream(miniature, rows[:12], SITE, batch=100, seed=4)
    batches, seen = stream.batches(), []
    for _ in range(8):
        seen.append(next(batches))
    again = stream.batches(seen[2].after)
    for expected in seen[3:]:
        got = next(again)
        assert torch.equal(expected.values[SITE], got.values[SITE])
        assert expected.after == got.after
    first = [b for b in seen if b.after.round == 0 or (b.after.round, b.after.batch) == (1, 0)]
    tokens = torch.cat([b.values[SITE] for b in first])
    assert all(len(b.values[SITE]) >= 100 for b in seen)
    assert len(tokens.unique(dim=0)) == len(tokens), "none twice in an epoch"
    assert not torch.equal(seen[0].values[SITE], seen[len(first)].values[SITE])


def kl_by_hand(model, ids, made):
    """KL of the model's predictions from those with `made` in place of layer 3, in float64."""
    hf = copy.deepcopy(model.hf).double()

    def logits():
        with torch.no_grad():
            return F.log_softmax(hf(ids).logits[0, 1:], dim=-1)

    clean = logits()

    def hook(_module, _args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, 1:] = made
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = hf.model.layers[3].register_forward_hook(hook)
    try:
        spliced = logits()
    finally:
        handle.remove()
    return float((clean.exp() * (clean - spliced)).sum(1).mean())


def test_the_gradient_of_the_kl_is_that_of_finite_differences(miniature, rows, generator):
    (batch, ids) = one_context(miniature, rows)
    x, scale = batch.values[SITE], 7.0
    made = (x + 0.3 * x.norm(dim=1, keepdim=True) * F.normalize(
        torch.randn(x.shape, generator=generator), dim=1)) / scale  # fmt: skip
    slope, kl = batch.through(scale)(made)
    assert kl == pytest.approx(kl_by_hand(miniature, ids, made.double() * scale), rel=1e-4)
    assert kl > 0.01
    for direction in (slope, torch.randn(x.shape, generator=generator)):
        unit = direction.double() / direction.double().norm()
        h = 1e-3 * float(made.norm())
        ends = [kl_by_hand(miniature, ids, (made + s * h * unit) * scale) for s in (1, -1)]
        # Float32 through three layers, against float64; differences are exact to h^2.
        wanted = (ends[0] - ends[1]) / (2 * h)
        along = float((slope.double() * unit).sum())
        assert along == pytest.approx(wanted, rel=1e-2, abs=1e-3 * float(slope.norm()))


def one_context(miniature, rows):
    few = [row for row in rows if len(row.ids) == 32][:1]
    stream = ThroughStream(miniature, few, SITE, batch=8, seed=0)
    return next(stream.batches()), torch.tensor([few[0].ids])


def test_what_is_exact_has_no_kl(miniature, rows):
    batch, _ = one_context(miniature, rows)
    slope, kl = batch.through(2.0)(batch.values[SITE] / 2)
    assert kl == pytest.approx(0, abs=1e-6)
    assert slope.norm() < 1e-3


def test_both_terms_weigh_as_the_paper_has_it(miniature, rows, tmp_path):
    """`(MSE + a b KL) / (1 + b)`: with a slope along the error's, by how much is by hand."""
    given = SAE | {"reads": "3.resid_post", "end_to_end": {"weight": 3.0},
                   "sparsity": {"penalty": "none"}}  # fmt: skip
    chosen = config(tmp_path / "run", given)
    seen, losses = {}, {}
    for name in ("plain", "both"):
        stream = ThroughStream(miniature, rows, SITE, batch=128, seed=0)
        run = Trainer(chosen, stream)
        (learner,) = run.learners
        learner.adam = recorder = Recorder()
        batch = next(stream.batches())
        y = batch.values[SITE] / learner.scales.c_out[0]
        through = (lambda made, y=y: ((made - y) * (2 / len(y)), 0.5)) if name == "both" else None
        codes = run._encode([learner], _scaled(batch))[0]
        losses[name] = learner.learn([y], y, codes, through)
        seen[name] = recorder.seen
    alpha = losses["plain"].error / 0.5
    factor = (1 + alpha * 3.0) / (1 + 3.0)
    for name in ("w_enc.0", "w_dec.0", "b_dec"):
        torch.testing.assert_close(
            seen["both"][name], seen["plain"][name] * factor, rtol=1e-4, atol=1e-6
        )
    assert (losses["plain"].kl, losses["both"].kl) == (None, 0.5)


def _scaled(batch):
    from gemscope.train._trainer import _Scaled

    return _Scaled(batch)


def test_the_kl_falls(miniature, rows, tmp_path):
    entry = next(e for e in catalog(release="miniature") if e.reads == SITE)
    given = {"name": "x", "reads": "3.resid_post", "d_sae": entry.d_sae, "l0": 12,
             "start": entry.address, "end_to_end": {"weight": 1.0},
             "optimizer": {"lr": 1e-3, "warm_up": 0}, "sparsity": {"penalty": "none"}}  # fmt: skip
    chosen = config(tmp_path / "run", given, data__batch=256, data__tokens=256 * 20)
    # The same contexts again and again: what is learned about them shows at once.
    stream = ThroughStream(miniature, rows[:9], SITE, batch=256, seed=0)
    run = Trainer(chosen, stream, run_module._starts(chosen, miniature))
    kls = [m[0].kl for m in advanced(run, 9)]
    assert sum(kls[-3:]) < 0.8 * sum(kls[:3])


@pytest.mark.slow
def test_end_to_end_goes_on_bit_equal(miniature, tmp_path):
    given = SAE | {"reads": "3.resid_post", "end_to_end": {"weight": 1.0}}
    few = {"data__tokens": 6 * 128, "checkpoint_every": 2}

    class Killed(Exception):  # noqa: N818
        pass

    def kill(progress):
        if progress.step == 5:
            raise Killed

    whole = train(config(tmp_path / "whole", given, **few), model=miniature)
    with pytest.raises(Killed):
        train(config(tmp_path / "parts", given, **few), model=miniature, report=kill)
    parts = train(config(tmp_path / "parts", given, **few), model=miniature, resume=True)
    for name, value in weights(whole / "sae").items():
        assert torch.equal(value, weights(parts / "sae")[name]), name
    lines = [(f / "metrics" / "sae.jsonl").read_text() for f in (whole, parts)]
    assert lines[0] == lines[1]
    assert '"kl": null' not in lines[0]
