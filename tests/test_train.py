"""Laws of training, on activations made of known features: no language model is run."""

import json

import pytest
import torch
import yaml
from training import KINDS, SAE, Held, advanced, config, planted, trainer

from gemscope.sites import Site
from gemscope.train import Trainer, read_config
from gemscope.train._adam import rate
from gemscope.train._config import Optimizer
from gemscope.train._weights import align, drawn, fit_skips, measure_thresholds

PLAIN = {"name": "x", "reads": "1.resid_post", "d_sae": 96, "l0": 5}


LONGER = {"data__tokens": 128 * 40, "optimizer__lr": 5e-3}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_after_every_step_rows_are_unit_and_thresholds_positive(tmp_path):
    run = trainer(config(tmp_path / "run", *KINDS))
    for _ in range(4):
        advanced(run, 1)
        for x in run.learners:
            for rows in x.weights.w_dec:
                # A float32 norm of 64 entries, rounded.
                torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=0,
                                           atol=64 * 2.0**-24)  # fmt: skip
            for threshold in x.weights.threshold:
                assert threshold.dtype == torch.float32
                assert threshold.min() > 0 or x.config.activation != "jumprelu"
            assert all(v.isfinite().all() for v in x.weights.named().values())


def test_the_scale_of_activations_is_no_matter(tmp_path):
    """Twice the activations, to the last bit the same weights, and files twice as large."""
    chosen = config(tmp_path / "run", *KINDS)
    values = planted()
    runs = [
        Trainer(chosen, Held({s: v * scale for s, v in values.items()}, 128)) for scale in (1, 4)
    ]
    for run in runs:
        advanced(run, 5)
    for a, b in zip(runs[0].learners, runs[1].learners, strict=True):
        for name, value in a.weights.named().items():
            assert torch.equal(value, b.weights.named()[name]), (a.config.name, name)
        one, four = a.weights.folded(a.scales), b.weights.folded(b.scales)
        for small, large in zip(one, four, strict=True):
            assert torch.equal(small.threshold * 4, large.threshold)
            assert torch.equal(small.b_dec * 4, large.b_dec)
            assert torch.equal(small.w_dec, large.w_dec)


def test_training_learns_and_reaches_its_l0(tmp_path):
    """With the target moved until the L0 itself is there."""
    aimed = PLAIN | {"sparsity": {"aim": 0.05}}
    run = trainer(config(tmp_path / "run", aimed, data__tokens=128 * 250, optimizer__lr=3e-3))
    measured = [m[0] for m in advanced(run, 250)]
    assert mean(m.error for m in measured[-20:]) < 0.5 * mean(m.error for m in measured[:10])
    # 20 batches of 128 tokens: the L0's own noise is far below a hundredth.
    assert mean(m.l0 for m in measured[-20:]) == pytest.approx(5, rel=0.05)


def test_the_aim_goes_against_the_difference_and_stays_near(tmp_path):
    run = trainer(config(tmp_path / "run", PLAIN | {"sparsity": {"aim": 0.25}}))
    (learner,) = run.learners
    aim = 5.0
    for _ in range(6):
        ((m,),) = advanced(run, 1)
        aim = min(max(aim + 0.25 * (5 - m.l0), 2.5), 10)
        assert learner.aim == pytest.approx(aim)
    assert learner.aim == 2.5


@pytest.mark.parametrize(
    "sparsity",
    [{"coefficient": 0.3}, {"penalty": "linear", "coefficient": 0.1}, {"frequency": 0.5}],
)
def test_each_penalty_makes_features_rarer(sparsity, tmp_path):
    ends = []
    for given in ({"coefficient": 0.0}, {"coefficient": 0.0} | sparsity):
        run = trainer(config(tmp_path / "run", PLAIN | {"sparsity": given}, **LONGER))
        ends.append(mean(m.l0 for (m,) in advanced(run, 40)[-5:]))
    assert ends[1] < 0.8 * ends[0]


def test_the_l1_penalty_makes_features_rarer(tmp_path):
    ends = []
    for coefficient in (0.0, 0.3):
        given = {"penalty": "l1", "coefficient": coefficient}
        run = trainer(
            config(tmp_path / "run", PLAIN | {"activation": "relu", "sparsity": given}, **LONGER)
        )
        ends.append(mean(m.l0 for (m,) in advanced(run, 40)[-5:]))
    assert ends[1] < 0.8 * ends[0]


def test_the_rate_of_thresholds_is_a_multiple(tmp_path):
    moved = []
    for factor in (1.0, 4.0):
        run = trainer(config(tmp_path / "run", PLAIN, optimizer__threshold_lr=factor))
        (learner,) = run.learners
        before = {n: v.clone() for n, v in learner.weights.named().items()}
        advanced(run, 1)
        moved.append({n: float((v - before[n]).norm()) for n, v in learner.weights.named().items()})
    assert moved[1]["threshold.0"] == pytest.approx(4 * moved[0]["threshold.0"], rel=1e-3)
    assert moved[1]["w_enc.0"] == moved[0]["w_enc.0"]


def test_the_learning_rate_follows_the_recipe():
    o = Optimizer(lr=2.0, warm_up=4, decay=0.5)
    rates = [rate(o, step, 20) for step in range(20)]
    # A tenth, then half a cosine: at its middle in the middle.
    assert rates[:5] == pytest.approx([0.2, 0.2 + 1.8 * 0.1464466, 1.1, 0.2 + 1.8 * 0.8535534, 2.0])
    assert rates[5:11] == pytest.approx([2.0] * 6)
    assert rates[11:] == pytest.approx([2.0 * left / 10 for left in range(9, 0, -1)])
    assert {rate(Optimizer(lr=2.0, warm_up=0), step, 20) for step in range(20)} == {2.0}


def test_features_at_the_start_fire_equally_often(tmp_path):
    run = trainer(config(tmp_path / "run", PLAIN))
    (learner,) = run.learners
    x = planted()[Site.parse("1.resid_post")][:4_096] / learner.scales.c_in[0]
    fires = learner.weights.pre_activations(0, x) > learner.weights.threshold[0]
    wanted = round(4_096 * 16 / 96)
    # The entry that is the threshold does not fire; a threshold is never 0.
    assert ((fires.sum(0) - wanted).abs() <= 1).double().mean() > 0.95


def transcoding(affine, tokens=400):
    g = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(tokens, 12, generator=g), dim=1)
    linear = x @ torch.randn(12, 12, generator=g) / 12**0.5
    y = torch.tanh(3 * x @ torch.randn(12, 12, generator=g)) / 12**0.5 + affine * linear + 0.3
    w = drawn(12, 12, [40], sae=False, affine=affine, centre=y.mean(0), threshold=0.1, generator=g)
    measure_thresholds(w, [x], 6.0)
    return w, x, y


def missed(w, x, y):
    z = w.pre_activations(0, x)
    made = (z * (z > w.threshold[0])) @ w.w_dec[0] + w.b_dec
    if w.skip:
        made = made + x @ w.skip[0]
    return float((made - y).square().sum() / (y - y.mean(0)).square().sum())


def test_a_transcoder_begins_with_features_that_explain_something():
    """After alignment the features reduce the error; before, they add to it."""
    w, x, y = transcoding(affine=False)
    fired = w.pre_activations(0, x) > w.threshold[0]
    assert missed(w, x, y) > 1
    align(w, [x], y)
    assert missed(w, x, y) < 0.95
    # Scaling moves no feature across its threshold, but for the token that is the threshold.
    assert ((w.pre_activations(0, x) > w.threshold[0]) == fired).float().mean() > 0.99
    torch.testing.assert_close(w.w_dec[0].norm(dim=1), torch.ones(40))


def test_a_skip_connection_begins_at_the_best_linear_map():
    w, x, y = transcoding(affine=True)
    fit_skips(w, [x], y)
    made = x @ w.skip[0] + w.b_dec
    one = torch.cat((x, torch.ones(len(x), 1)), 1).double()
    best = one @ torch.linalg.lstsq(one, y.double()).solution
    ours, least = ((m - y).square().sum() for m in (made.double(), best))
    # The ridge is a hundredth of the mean variance: where that is, it shrinks by a hundredth.
    assert least <= ours <= 1.01 * least
    torch.testing.assert_close(made.mean(0), y.mean(0), rtol=1e-4, atol=1e-5)


def test_a_prefix_reconstructs_better_than_as_many_features_of_a_plain_one(tmp_path):
    nested = PLAIN | {"name": "nested", "prefixes": [24, 48]}
    run = trainer(config(tmp_path / "run", PLAIN, nested, data__tokens=128 * 100,
                         optimizer__lr=3e-3))  # fmt: skip
    advanced(run, 100)
    x = planted()[Site.parse("1.resid_post")]
    errors = []
    for learner in run.learners:
        w, y = learner.weights, x / learner.scales.c_in[0]
        z = w.pre_activations(0, y)[:, :24]
        made = z * (z > w.threshold[0][:24]) @ w.w_dec[0][:24] + w.b_dec
        errors.append(float((made - y).square().sum(1).mean()))
    assert errors[1] < 0.8 * errors[0], errors


def test_dead_features_come_back(tmp_path):
    """With the auxiliary loss fewer are dead than without; the seed is the same."""
    shares = []
    for auxk in (None, {"features": 32, "dead_after": 256, "coefficient": 0.1}):
        a = PLAIN | {"activation": "topk", "l0": 3, "d_sae": 192, "auxk": auxk}
        run = trainer(config(tmp_path / "run", a, data__tokens=128 * 150, optimizer__lr=3e-3))
        (learner,) = run.learners
        learner.weights.b_enc[0][::2] -= 0.3  # half of them are rarely among the largest
        advanced(run, 150)
        shares.append(float((learner.silent[0] >= 1_280).double().mean()))
    assert shares[0] > 0.3
    assert shares[1] < 0.5 * shares[0]


def test_tokens_since_a_feature_fired_are_counted(tmp_path):
    run = trainer(config(tmp_path / "run", *KINDS))
    for learner in run.learners:
        learner.weights.b_enc[0][5] = -9.0
    advanced(run, 3)
    for learner in run.learners:
        assert learner.silent[0][5] == 3 * 128, learner.config.name
        assert learner.silent[0].min() == 0
        assert learner.tokens == 3 * 128


def test_metrics_are_means_of_what_steps_measured(tmp_path):
    chosen = config(tmp_path / "run", SAE, KINDS[2], data__tokens=128 * 1_203)
    run = trainer(chosen)
    assert run.metrics.every == 3
    measured = []
    for _ in range(5):
        batch = next(run.source.batches(run.position))
        measured.append(run.advance(batch))
        run.metrics.add(run.step, measured[-1], tmp_path / "run")
    y = planted()[Site.parse("1.resid_post")][:16_384]
    variance = float((y - y.mean(0)).square().sum() / y.square().sum())
    for place, name in enumerate(("sae", "topk")):
        lines = (tmp_path / "run" / "metrics" / f"{name}.jsonl").read_text().splitlines()
        (line,) = map(json.loads, lines)
        assert (line["name"], line["step"], line["tokens"]) == (name, 3, 384)
        for key in ("loss", "l0"):
            assert line[key] == pytest.approx(mean(getattr(m[place], key) for m in measured[:3]))
        if name == "topk":
            error = mean(m[place].error for m in measured[:3])
            assert line["fvu"] == pytest.approx(error / variance, rel=1e-4)
        now = run.progress().standings[place]
        assert now.l0 == pytest.approx(mean(m[place].l0 for m in measured[3:]))


def test_numbers_may_be_written_as_everyone_writes_them(tmp_path):
    raw = config(tmp_path / "run").model_dump(mode="json")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw).replace("lr: 0.001", "lr: 1e-3"))
    assert "1e-3" in file.read_text()
    assert read_config(file).artefacts[0].optimizer.lr == 1e-3
    changed = read_config(file, ["artefacts.0.optimizer.lr=2E-4", "data.tokens=100_000"])
    assert changed.artefacts[0].optimizer.lr == 2e-4
    assert changed.data.tokens == 100_000
    assert read_config(file) == config(tmp_path / "run")
