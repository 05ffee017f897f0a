"""Steps of training against float64 autograd, and Adam against torch's."""

import pytest
import torch
import torch.nn.functional as F
from reference import gradients

from gemscope.train._adam import Adam, rate
from gemscope.train._bank import encode
from gemscope.train._config import Artefact, AuxK, Optimizer, Sparsity
from gemscope.train._learner import Learner
from gemscope.train._weights import Scales, Weights, drawn, unfolded

D = 24


def artefact(**changes):
    layers = changes.pop("layers", 1)
    many = layers > 1
    transcoder = changes.pop("transcoder", False)
    defaults = {
        "name": "x",
        "reads": f"0-{layers - 1}.mlp_in" if many and transcoder else "0.mlp_in" if transcoder
        else f"0-{layers - 1}.resid_post" if many else "0.resid_post",
        "writes": f"0-{layers - 1}.mlp_out" if many and transcoder else "0.mlp_out" if transcoder
        else f"0-{layers - 1}.resid_post" if many else "0.resid_post",
        "d_sae": 96 * layers,
        "l0": 9.0,
        "sparsity": Sparsity(
            coefficient=0.03, warm_up=4, frequency=0.01, bandwidth=0.2, threshold=0.15
        ),
        "optimizer": Optimizer(lr=1e-3, warm_up=0),
    }  # fmt: skip
    return Artefact(**defaults | changes)


class Recorder(Adam):
    """Takes gradients down and changes nothing."""

    def __init__(self):
        self.seen = {}

    def begin(self, lr):
        pass

    def rows(self, name, parameter, first, gradient, stop, *, unit):
        whole = self.seen.setdefault(name, torch.zeros_like(parameter))
        half = (stop - first) // 2  # in two parts, as a long matrix is gone through
        for a, b in ((0, half), (half, stop - first)):
            g, rows = gradient(a, b).clone(), parameter[first + a : first + b]
            whole[first + a : first + b] = g - (g * rows).sum(1, keepdim=True) * rows if unit else g

    def whole(self, name, parameter, gradient, scale=1.0):
        self.seen[name] = gradient.clone()


def start(a, generator, tokens=160):
    n = len(a.reads) if isinstance(a.reads, tuple) else 1
    weights = drawn(
        D, D, [a.d_sae // n] * n, sae=a.reads == a.writes, affine=a.affine,
        centre=torch.randn(n * D, generator=generator) * 0.1,
        threshold=a.sparsity.threshold if a.activation == "jumprelu" else 0.0,
        generator=generator,
    )  # fmt: skip
    for values in (weights.b_enc, weights.skip):
        for value in values:
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    for value in weights.threshold:
        value.mul_(0.5 + torch.rand(len(value), generator=generator))
    xs = [F.normalize(torch.randn(tokens, D, generator=generator), dim=1) for _ in range(n)]
    if a.reads == a.writes:
        y = torch.cat(xs, 1)
    else:
        y = torch.randn(tokens, n * D, generator=generator) / D**0.5
    return weights, xs, y


def learner_of(a, weights, way):
    n = weights.n_layers
    learner = Learner(a, weights, Scales((1.0,) * n, (1.0,) * n), 1_000)
    learner.density = 1.0 if way == "dense" else 0.0
    learner.adam = Recorder()
    return learner


def step(learner, xs, y):
    codes = [encode(x, m.w_enc, [m])[0] for x, m in zip(xs, learner.members(), strict=True)]
    return learner.learn(xs, y, codes)


CASES = {
    "quadratic": {},
    "linear": {"sparsity": Sparsity(penalty="linear", coefficient=0.03, warm_up=0, bandwidth=0.2,
                                    threshold=0.15)},
    "window as wide as the threshold": {
        "sparsity": Sparsity(coefficient=0.03, warm_up=4, bandwidth=0.6, threshold=0.15)},
    "matryoshka": {"prefixes": (10, 40), "prefix_weights": (0.2, 0.3, 0.5)},
    "transcoder": {"transcoder": True},
    "affine": {"transcoder": True, "affine": True},
    "crosscoder": {"layers": 3},
    "clt": {"layers": 3, "transcoder": True, "affine": True},
    "relu": {"activation": "relu", "sparsity": Sparsity(penalty="l1", coefficient=0.03, warm_up=2)},
    "topk": {"activation": "topk"},
    "batch-topk": {"activation": "batch-topk"},
    "topk in prefixes": {"activation": "topk", "prefixes": (10, 40)},
}  # fmt: skip


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float64_autograd(case, way, generator):
    a = artefact(**CASES[case])
    weights, xs, y = start(a, generator)
    wanted, loss = gradients(a, weights, xs, y)
    learner = learner_of(a, weights, way)
    measured = step(learner, xs, y)
    check(learner.adam.seen, wanted, a)
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    if case != "relu" and "topk" not in case:
        assert sum(float(wanted[n].abs().sum()) for n in wanted if n.startswith("thr")) > 0


def check(seen, wanted, a):
    for name, value in wanted.items():
        if name.startswith("threshold") and a.activation != "jumprelu":
            continue
        # Sums of at most a few thousand float32 terms: their rounding, of the largest.
        bound = 2_000 * 2.0**-24 * max(float(value.abs().max()), 1e-6)
        assert (seen[name].double() - value).abs().max() <= bound, name


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_silent_features_just_below_their_threshold_move_it(way, generator):
    """A step that only sees what fires halves this gradient."""
    a = artefact(sparsity=Sparsity(coefficient=0.03, warm_up=0, bandwidth=0.2, threshold=0.3))
    weights, xs, y = start(a, generator)
    z = weights.pre_activations(0, xs[0])
    below = ((z <= weights.threshold[0]) & (z > weights.threshold[0] - 0.1)).sum()
    assert below > 100
    wanted, _ = gradients(a, weights, xs, y)
    learner = learner_of(a, weights, way)
    step(learner, xs, y)
    check(learner.adam.seen, wanted, a)


def test_dead_features_learn_what_the_living_leave(generator):
    a = artefact(activation="topk", auxk=AuxK(features=7, coefficient=0.3, dead_after=10))
    weights, xs, y = start(a, generator)
    learner = learner_of(a, weights, "sparse")
    dead = torch.arange(3, 60, 2)
    weights.b_enc[0][dead] -= 0.4  # so that they are not among the largest
    learner.silent[0][dead] = 10
    wanted, loss = gradients(a, weights, xs, y, dead=dead)
    measured = step(learner, xs, y)
    check(learner.adam.seen, wanted, a)
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    without, _ = gradients(a, weights, xs, y)
    assert (wanted["w_enc.0"][dead] - without["w_enc.0"][dead]).norm() > 0


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_is_torchs(beta1, clip, generator):
    """Projection, clipping, update and unit rows, against torch's optimizer in float64."""
    a = artefact(optimizer=Optimizer(lr=2e-3, beta1=beta1, warm_up=3, decay=0.5, clip=clip))
    weights, xs, y = start(a, generator)
    plain = {n: p.double().clone().requires_grad_() for n, p in weights.named().items()}
    theirs = torch.optim.Adam(list(plain.values()), lr=1.0, betas=(beta1, 0.999), eps=1e-8)
    learner = learner_of(a, weights, "dense")
    learner.adam = Adam(a.optimizer, weights.named())
    for number in range(4):
        now = as_weights(plain, weights)
        wanted, _ = gradients(a, now, xs, y, step=number)
        if clip:
            norm = sum(g.square().sum() for g in wanted.values()).sqrt()
            wanted = {n: g * min(1, clip / float(norm)) for n, g in wanted.items()}
        for name, p in plain.items():
            p.grad = wanted[name]
        theirs.param_groups[0]["lr"] = rate(a.optimizer, number, 1_000)
        theirs.step()
        with torch.no_grad():
            plain["w_dec.0"].copy_(F.normalize(plain["w_dec.0"], dim=1))
            plain["threshold.0"].clamp_(min=1e-6)
        step(learner, xs, y)
    for name, p in weights.named().items():
        moved = (plain[name] - start_value(name, a, generator)).abs().max()
        # Adam divides by the size of gradients: where they are near 0 their rounding shows.
        close = (p.double() - plain[name]).abs() <= 0.02 * moved
        assert close.double().mean() > 0.995, name


def start_value(name, a, generator):
    again, _, _ = start(a, generator.manual_seed(generator.initial_seed()))
    return again.named()[name].double()


def as_weights(named, like):
    def of(name):
        return [v.detach() for n, v in named.items() if n.startswith(f"{name}.")]

    return Weights(of("w_enc"), of("b_enc"), of("threshold"), of("w_dec"),
                   named["b_dec"].detach(), of("skip"), like.pre_bias)  # fmt: skip


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("transcoder", [False, True])
def test_folding_changes_nothing_and_is_undone(layers, transcoder, generator):
    a = artefact(layers=layers, transcoder=transcoder, affine=transcoder)
    weights, xs, y = start(a, generator)
    c_in = (3.0, 7.0, 0.5)[:layers]
    scales = Scales(c_in, c_in if not transcoder else (11.0, 2.0, 5.0)[:layers])
    parts = weights.folded(scales)
    for i, (part, x) in enumerate(zip(parts, xs, strict=True)):
        raw = x * scales.c_in[i]
        z = raw @ part.w_enc + part.b_enc
        torch.testing.assert_close(
            z / scales.c_out[i], weights.pre_activations(i, x), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(z > part.threshold, weights.pre_activations(i, x) > weights.threshold[i])
    again = unfolded(parts, scales, pre_bias=weights.pre_bias)
    for name, value in weights.named().items():
        torch.testing.assert_close(again.named()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    del y
