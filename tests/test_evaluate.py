"""Every metric against an independent float64 computation, and the laws of the definitions."""

import json
import math
import re
from dataclasses import replace as change

import numpy as np
import pytest
import torch

from gemscope.corpus import Document, read_text
from gemscope.errors import InputError
from gemscope.evaluate import Settings, evaluate, uniformity
from gemscope.evaluate._statistics import FeatureStatistics, density_histogram
from gemscope.evaluate._sums import DocumentSums
from gemscope.hub import build
from gemscope.lm import load_model
from gemscope.sae import SAE, JumpReLU, ReLU, SparseFeatures

TEXTS = [
    'def add(a, b):\n    """Add two numbers."""\n    return a + b\n',
    "import os\n\n\nclass Walker:\n    def __init__(self, top):\n        self.top = top\n",
    "for name in sorted(names):\n    print(name, file=sys.stderr)\n",
]
ONE_LAYER = ("sae", "transcoder")
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def exact():
    """The bundled model in float64: what is left to differ is the dictionary's float32."""
    return load_model("miniature", device="cpu", dtype="float64")


def oracle(model, sae, ours):
    """All metrics from their definitions, with plain loops over contexts, in float64.

    `ours` gives the features within float32 rounding of their threshold, which may fall either
    way; everything else is computed here.
    """
    hf, layers = model.hf, model.hf.model.layers
    norms = {
        "resid_post": lambda layer: layer,
        "mlp_in": lambda layer: layer.pre_feedforward_layernorm,
        "mlp_out": lambda layer: layer.post_feedforward_layernorm,
    }
    reads = norms[sae.reads.stream](layers[sae.reads.layer])
    writes = norms[sae.writes.stream](layers[sae.writes.layer])
    seen = {}

    def forward(ids, new=None):
        def read(_m, _a, out):
            seen["x"] = (out[0] if isinstance(out, tuple) else out).clone()

        def write(_m, _a, out):
            value = out[0] if isinstance(out, tuple) else out
            seen["y"] = value.clone()
            if new is None:
                return None
            value = value.clone()
            value[0, 1:] = new(seen["x"][0, 1:], value[0, 1:])
            return (value, *out[1:]) if isinstance(out, tuple) else value

        hooks = [reads.register_forward_hook(read), writes.register_forward_hook(write)]
        with torch.no_grad():
            logits = hf(ids).logits[0]
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)

    w_enc, b_enc = sae.w_enc.double(), sae.b_enc.double()
    w_dec, b_dec = sae.w_dec.double(), sae.b_dec.double()
    theta = sae.activation.threshold.double()
    flips = 0

    def features(x):
        nonlocal flips
        pre = x @ w_enc + b_enc
        bound = (len(b_enc) + 2) * 2**-24 * (x.abs() @ w_enc.abs() + b_enc.abs() + theta)
        near = (pre - theta).abs() <= bound
        flips += int(near.sum())
        fires = torch.where(near, ours(x.float()) > 0, pre > theta)
        return pre * fires

    def decode(f, x):
        out = f @ w_dec + b_dec
        return out if sae.skip is None else out + x @ sae.skip.double()

    rows = [model.tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    xs, ys, clean = [], [], []
    for ids in rows:
        clean.append(forward(ids))
        xs.append(seen["x"][0, 1:])
        ys.append(seen["y"][0, 1:])
    x, y = torch.cat(xs), torch.cat(ys)
    f = features(x)
    out = decode(f, x)
    mean = y.mean(0)

    def losses(new):
        found, divergence = [], []
        for ids, logp in zip(rows, clean, strict=True):
            other = forward(ids, new)
            found += [-other[t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1)]
            divergence += [
                (logp[t].exp() * (logp[t] - other[t])).sum().item() for t in range(1, ids.shape[1])
            ]
        return np.mean(found), np.mean(divergence)

    base, _ = losses(lambda x, y: y)
    spliced, kl = losses(lambda x, y: decode(features(x), x))
    zero, _ = losses(lambda x, y: torch.zeros_like(y))
    average, _ = losses(lambda x, y: mean.expand_as(y))
    error = (out - y).square().sum(1)
    expected = {
        "l0": (f > 0).double().sum(1).mean(),
        "fvu": error.mean() / (y - mean).square().sum(1).mean(),
        "fvu_global": (out - y).square().mean() / y.var(),
        "mse": (out - y).square().mean(),
        "cosine": torch.nn.functional.cosine_similarity(out, y).mean(),
        "norm_ratio": (out.norm(dim=1) / y.norm(dim=1)).mean(),
        "reconstruction_bias": out.square().sum(1).mean() / (out * y).sum(1).mean(),
        "loss_clean": base,
        "loss_spliced": spliced,
        "loss_zero": zero,
        "loss_mean": average,
        "delta_loss": spliced - base,
        "kl": kl,
        "loss_recovered_zero": (zero - spliced) / (zero - base),
        "loss_recovered_mean": (average - spliced) / (average - base),
        "dead_fraction": 1 - (f > 0).any(0).double().mean(),
        "dense_fraction": ((f > 0).double().mean(0) > 0.1).double().mean(),
    }
    return {name: float(value) for name, value in expected.items()}, flips, f.numel()


@pytest.mark.parametrize("stream", ["resid_post", "mlp_out", "mlp_in"])
def test_every_metric_against_float64(exact, kinds, stream):
    sae = build(next(e for e in kinds if e.kind in ONE_LAYER and e.reads.stream == stream))
    (result,) = evaluate(exact, [sae], DOCUMENTS)
    expected, flips, entries_ = oracle(exact, sae, lambda x: sae.encode(x).dense())
    assert flips < 1e-3 * entries_
    for name, value in expected.items():
        # Features and reconstructions are float32: relative rounding of 2^-24 in sums of some
        # 300 terms, a thousand times less than what any wrong definition would give.
        assert result.metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    assert result.tokens == sum(
        len(exact.tokenizer(t, add_special_tokens=False).input_ids) for t in TEXTS
    )


def test_importance_uniformity_against_float64(exact, residual):
    (result,) = evaluate(exact, [residual], DOCUMENTS)
    found = []
    for text in TEXTS:
        ids = exact.tokenizer(text, return_tensors="pt").input_ids
        leaf = {}

        def hook(_m, _a, out, leaf=leaf):
            value = out[0] if isinstance(out, tuple) else out
            leaf["x"] = value.detach().requires_grad_()
            return (leaf["x"], *out[1:]) if isinstance(out, tuple) else leaf["x"]

        handle = exact.hf.model.layers[residual.writes.layer].register_forward_hook(hook)
        with torch.enable_grad():
            logits = exact.hf(ids).logits[0]
            value = sum(
                logits[t, ids[0, t + 1]] - logits[t].mean() for t in range(ids.shape[1] - 1)
            )
            (gradient,) = torch.autograd.grad(value, [leaf["x"]])
        handle.remove()
        f = residual.encode(leaf["x"].detach()[0, 1:]).dense().double()
        y = (f * (gradient[0, 1:] @ residual.w_dec.double().T)).abs()
        for row in y[y.sum(1) > 0]:
            p = row[row > 0] / row.sum()
            found.append(math.exp(-(p * p.log()).sum()) / len(p))
    assert result.metrics["importance_uniformity"] == pytest.approx(np.mean(found), rel=1e-4)


def test_float32_gives_the_float64_figures(miniature, exact, residual):
    (single,) = evaluate(miniature, [residual], DOCUMENTS)
    (double,) = evaluate(exact, [residual], DOCUMENTS)
    for name, value in double.metrics.items():
        # A float32 forward pass is good to some 1e-5 in its logits, and a feature in ten thousand
        # lies so near its threshold that it flips.
        assert single.metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_batches_and_neighbours_do_not_change_a_figure(miniature, kinds):
    one, other = (build(e) for e in kinds[:2])
    (alone,) = evaluate(miniature, [one], DOCUMENTS, Settings(batch=1))
    together, _ = evaluate(miniature, [one, other], DOCUMENTS, Settings(batch=3))
    for name, value in alone.metrics.items():
        assert together.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert alone.tokens == together.tokens


def identity(sae, scale=1.0, offset=0.0):
    """A dictionary that gives back `scale * x + offset` exactly: a feature for each sign."""
    eye = torch.eye(sae.d_in)
    return SAE(
        w_enc=torch.cat((eye, -eye), 1),
        b_enc=torch.zeros(2 * sae.d_in),
        w_dec=torch.cat((eye, -eye)) * scale,
        b_dec=torch.full((sae.d_in,), offset),
        activation=ReLU(),
        reads=sae.reads,
        writes=sae.reads,
    )


def test_a_perfect_reconstruction_costs_nothing(miniature, residual):
    (result,) = evaluate(miniature, [identity(residual)], DOCUMENTS)
    m = result.metrics
    assert (m["fvu"], m["mse"], m["delta_loss"]) == (0, 0, 0)
    assert m["kl"] == pytest.approx(0, abs=1e-6)
    assert m["cosine"] == pytest.approx(1)
    assert (m["loss_recovered_zero"], m["loss_recovered_mean"]) == (1, 1)


def test_the_mean_explains_nothing_and_zero_recovers_nothing(miniature, residual):
    none = change(identity(residual, scale=0.0), activation=JumpReLU(torch.full((512,), 1e9)))
    (zero,) = evaluate(miniature, [none], DOCUMENTS)
    assert zero.metrics["loss_recovered_zero"] == 0
    x = torch.cat(
        [miniature.run(t, read=[residual.reads])[residual.reads][0, 1:] for t in TEXTS]
    ).double()
    constant = change(none, b_dec=x.mean(0).float())
    (mean,) = evaluate(miniature, [constant], DOCUMENTS)
    assert mean.metrics["fvu"] == pytest.approx(1, rel=1e-5)
    assert mean.metrics["loss_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert mean.metrics["fvu_global"] < 1
    assert mean.metrics["l0"] == 0


def test_a_constant_offset_is_an_error(miniature, residual):
    (result,) = evaluate(miniature, [identity(residual, offset=0.5)], DOCUMENTS)
    assert result.metrics["mse"] == pytest.approx(0.25, rel=1e-5)


def test_the_global_variant_is_never_above_the_papers(miniature, kinds):
    for result in evaluate(miniature, [build(e) for e in kinds], DOCUMENTS):
        assert 0 < result.metrics["fvu_global"] <= result.metrics["fvu"]


def test_bos_is_in_no_figure(miniature, residual):
    """Whatever a dictionary does to the outlier at BOS, no figure moves."""
    bos = miniature.run(TEXTS[0], read=[residual.reads])[residual.reads][0, 0]
    others = torch.cat(
        [miniature.run(t, read=[residual.reads])[residual.reads][0, 1:] for t in TEXTS]
    )
    direction = bos - others.mean(0)
    reach = (others @ direction).max().item()
    assert bos @ direction > reach, "BOS stands apart"
    plain = identity(residual)
    spiteful = change(
        plain,
        w_enc=torch.cat((plain.w_enc, direction[:, None]), 1),
        b_enc=torch.cat((plain.b_enc, torch.tensor([-(reach + float(bos @ direction)) / 2]))),
        w_dec=torch.cat((plain.w_dec, torch.full((1, 256), 1e3))),
    )
    assert spiteful.encode(bos).counts.item() > 256 - 1
    (result,) = evaluate(miniature, [spiteful], DOCUMENTS)
    assert result.metrics["fvu"] == 0
    assert result.metrics["delta_loss"] == 0


def test_the_random_dictionary_has_the_l0_and_not_the_quality(miniature, kinds):
    documents = read_text("miniature")
    saes = [build(e) for e in kinds]
    for result in evaluate(miniature, saes, documents, Settings(tokens=1_000)):
        assert result.baseline["l0"] == pytest.approx(result.metrics["l0"], rel=0.1)
        assert result.baseline["fvu"] > 1.3 * result.metrics["fvu"]


def test_uniformity_by_hand():
    features = SparseFeatures.from_dense(
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1e-9, 0.0], [0.0] * 3])
    )
    got = uniformity(features, torch.ones(3, 2), torch.ones(3, 2))
    assert got.tolist() == pytest.approx([1.0, 0.5], abs=1e-6)


def test_statistics_against_brute_force():
    g = torch.Generator().manual_seed(0)
    dense = torch.rand(600, 40, generator=g) * (torch.rand(600, 40, generator=g) < 0.1)
    documents = torch.arange(600) // 60
    kept = FeatureStatistics(40, keep=3)
    for part in torch.arange(600).split(77):
        kept.add(SparseFeatures.from_dense(dense[part]), documents[part], part)
    assert kept.fired.tolist() == (dense > 0).sum(0).tolist()
    assert kept.sums == pytest.approx(dense.double().sum(0).numpy())
    assert kept.peaks.tolist() == dense.amax(0).tolist()
    for feature in range(40):
        best = []
        for document in range(10):
            value, place = dense[documents == document, feature].max(0)
            if value > 0:
                best.append((document * 60 + int(place), float(value)))
        best.sort(key=lambda pair: -pair[1])
        assert kept.contexts(feature) == best[:3]


def test_densities_below_a_millionth_are_counted():
    histogram = density_histogram(np.array([0.0, 5e-7, 0.5, 1.0]))
    assert sum(histogram["features"]) == 3
    assert histogram["features"][-1] == 1 or histogram["features"][-2] == 1


def test_intervals_hold_the_figure_and_need_two_documents():
    sums = DocumentSums(("n", "l0"))
    rng = np.random.default_rng(0)
    for document in range(40):
        values = torch.tensor(rng.normal(5, 1, size=30) + rng.normal())
        sums.add(torch.full((30,), document), n=torch.ones(30), l0=values)
    figure = {"l0": lambda s: s["l0"] / s["n"]}
    low, high = sums.intervals(figure, seed=0)["l0"]
    assert low < sums.ratio("l0", "n") < high
    # The spread of document means is 1; a mean of 40 of them has a standard error of 0.16.
    assert 0.3 < high - low < 1.0
    single = DocumentSums(("n", "l0"))
    single.add(torch.zeros(30, dtype=torch.long), n=torch.ones(30), l0=torch.ones(30))
    assert single.intervals(figure, seed=0) == {"l0": None}


def test_too_little_text_is_told(miniature, residual):
    with pytest.raises(InputError, match="the text holds 0 tokens that count"):
        evaluate(miniature, [residual], [Document("a", "<bos><eos>")])


def test_the_report_escapes_what_the_text_holds(miniature, residual, entries, tmp_path):
    from gemscope.evaluate import record, write_report

    entry = next(e for e in entries if e.kind == "sae")
    nasty = [Document(f"<img src=x onerror=alert({i})>", "<script>alert(1)</script> | ` $x$\n" * 9)
             for i in range(3)]  # fmt: skip
    (result,) = evaluate(miniature, [residual], nasty)
    made = record(miniature, residual, entry, result, nasty, Settings(), text="<b>bold</b>")
    page = write_report(tmp_path, [made, made], title="<i>title</i>").read_text()
    body = page.split("</style>")[1]
    for tag in ("<script>alert", "<img src=x", "<b>bold", "<i>title"):
        assert tag not in body
    assert not re.search(
        r"""(src|href)=["']?(https?:)?//|url\(|@import""", body.replace("url(#", "")
    )
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "pareto.svg", "loss.svg", "density.svg", "positions.svg",
    }  # fmt: skip
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved[0]["fvu"] == made.metrics["fvu"]
    assert (tmp_path / "report.md").read_text().startswith("# <i>title</i>")
