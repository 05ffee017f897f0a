"""The reference trainer: gradients against an oracle, laws of the step, and nothing lost."""

import math
import os

import pytest
import torch
import yaml
from training import CONFIG, config

from gemscope.activations import ActivationStream, Position
from gemscope.corpus import contexts, read_text
from gemscope.errors import InputError
from gemscope.sites import Site
from gemscope.train import Trainer, read_config
from gemscope.train._dictionary import (
    Scales,
    align,
    frequency_penalty,
    initial,
    l0_penalty,
    measured_thresholds,
    remove_parallel,
)


def dictionary(*, transcoder=False, affine=False, threshold=0.05, d=12, m=40):
    g = torch.Generator().manual_seed(5)
    made = initial(
        d, m, d, transcoder=transcoder, affine=affine, centre=torch.randn(d, generator=g) / d,
        threshold=threshold, generator=g,
    )  # fmt: skip
    made.b_enc.copy_(torch.randn(m, generator=g) * 0.02)
    made.threshold.copy_(torch.rand(m, generator=g) * 0.1 + 0.02)
    for value in made.parameters().values():
        value.requires_grad_()
    return made


def oracle_gradients(made, x, y, *, bandwidth, coefficient, target, frequency, scale):
    """Gradients by float64 autograd, the two pseudo-derivatives of 2407.14435 put in by hand."""
    p = {n: v.detach().double().requires_grad_() for n, v in made.parameters().items()}
    x, y, theta = x.double(), y.double(), p["threshold"]
    centred = x - p["b_dec"] if made.pre_bias else x
    z = centred @ p["w_enc"] + p["b_enc"]
    active = (z > theta).double().detach()
    window = ((z - theta).abs() < bandwidth / 2).double().detach()
    # Zero in value; the slope in theta of a unit step at each entry in the window.
    jump = -(window / bandwidth) * (theta - theta.detach())
    f = z * active + theta.detach() * jump
    step = active + jump
    out = f @ p["w_dec"] + p["b_dec"]
    if "skip" in p:
        out = out + x @ p["skip"]
    loss = (
        ((out - y) ** 2).sum(1).mean()
        + coefficient * (2 / target) * ((step.sum(1) - target) ** 2).mean()
        + frequency * (step.mean(0) ** 2).sum() / scale
    )
    gradients = torch.autograd.grad(loss, list(p.values()))
    below = int((window * (1 - active)).sum())
    return dict(zip(p, gradients, strict=True)), below


@pytest.mark.parametrize(("transcoder", "affine"), [(False, False), (True, False), (True, True)])
def test_gradients_against_float64(transcoder, affine):
    made = dictionary(transcoder=transcoder, affine=affine)
    g = torch.Generator().manual_seed(6)
    x = torch.randn(64, 12, generator=g) / math.sqrt(12)
    y = torch.randn(64, 12, generator=g) / math.sqrt(12) if transcoder else x
    out = made(x, 0.05)
    loss = (out.y - y).square().sum(1).mean()
    loss = loss + 0.3 * l0_penalty(out.active, 7.0) + 0.2 * frequency_penalty(out.active, 0.1)
    loss.backward()
    expected, below = oracle_gradients(
        made, x, y, bandwidth=0.05, coefficient=0.3, target=7.0, frequency=0.2, scale=0.1
    )
    assert below > 50, "the case holds silent features inside the lower half-window"
    for name, value in expected.items():
        got = getattr(made, name).grad.double()
        # Sums of some hundred float32 terms; the threshold's are divided by the bandwidth.
        scale = value.abs().max()
        assert scale > 1e-3
        assert (got - value).abs().max() < 2e-5 * scale, name


def test_the_lower_half_window_matters():
    """A step that saw only what fires would give another threshold gradient."""
    made = dictionary()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(6)) / math.sqrt(12)
    l0_penalty(made(x, 0.05).active, 7.0).backward()
    z = made.pre_activations(x).detach()
    theta = made.threshold.detach()
    upper = ((z - theta).abs() < 0.025) & (z > theta)
    slope = 4 / 7.0 * ((z > theta).sum(1) - 7.0) / 64
    half = -(upper * slope[:, None]).sum(0) / 0.05
    assert (made.threshold.grad - half).abs().max() > 0.1 * made.threshold.grad.abs().max()


def test_scaling_everything_scales_the_features_and_nothing_else():
    made = dictionary()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(6)) / math.sqrt(12)
    out, folded = made(x, 0.05), made.folded(Scales(37.0, 37.0))
    f = 37.0 * x @ folded.w_enc + folded.b_enc
    f = f * (f > folded.threshold)
    torch.testing.assert_close(f, 37.0 * out.features.detach(), rtol=1e-4, atol=1e-4)
    y = f @ folded.w_dec + folded.b_dec
    torch.testing.assert_close(y, 37.0 * out.y.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.w_dec, made.w_dec.detach())


def test_folding_a_transcoder_keeps_its_function():
    made = dictionary(transcoder=True, affine=True)
    with torch.no_grad():
        made.skip.normal_(generator=torch.Generator().manual_seed(7))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(6))
    out, folded = made(x, 0.05), made.folded(Scales(3.0, 11.0))
    raw = 3.0 * x
    f = raw @ folded.w_enc + folded.b_enc
    f = f * (f > folded.threshold)
    assert ((f > 0).sum(1) == out.active.sum(1)).float().mean() > 0.98
    y = f @ folded.w_dec + folded.b_dec + raw @ folded.skip
    torch.testing.assert_close(y, 11.0 * out.y.detach(), rtol=1e-3, atol=2e-2)


def test_a_step_uses_the_projected_gradient(miniature, rows, tmp_path):
    trainer = Trainer(config(tmp_path), stream(miniature, rows))
    for _ in range(3):
        before = trainer.dictionary.w_dec.detach().clone()
        advanced(trainer, 1)
        gradient = trainer.dictionary.w_dec.grad
        assert ((gradient * before).sum(1).abs() <= 1e-5 * gradient.norm(dim=1)).all()


def test_the_projected_gradient_does_not_lengthen_a_row():
    rows = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    gradient = torch.randn(9, 5)
    remove_parallel(gradient, rows)
    assert (gradient * rows).sum(1).abs().max() < 1e-6


@pytest.fixture(scope="module")
def rows(miniature):
    return list(contexts(read_text("miniature"), miniature.tokenizer, length=64))


def stream(miniature, rows, **changes):
    site = Site.parse("2.resid_post")
    options = {"batch": 512, "bucket": 2_048, "seed": 3} | changes
    return ActivationStream(miniature, rows, site, site, **options)


def test_the_stream_goes_on_where_it_stopped(miniature, rows):
    whole = stream(miniature, rows[:100]).batches()
    seen = [next(whole) for _ in range(15)]
    again = stream(miniature, rows[:100]).batches(seen[6].after)
    for expected, got in zip(seen[7:], again, strict=False):
        assert torch.equal(expected.x, got.x)
        assert expected.after == got.after


def test_the_stream_serves_every_counted_token_once_an_epoch_and_never_bos(miniature, rows):
    few = rows[:24]
    source = stream(miniature, few, batch=64, bucket=512)
    wanted = torch.cat(
        [
            miniature.run(text, read=[Site.parse("2.resid_post")])[Site.parse("2.resid_post")][
                0, 1:
            ]
            for text in (miniature.tokenizer.decode(row.ids[1:]) for row in few[:2])
        ]
    )
    served, batches = [], source.batches()
    while True:
        batch = next(batches)
        served.append(batch.x)
        if batch.after.bucket >= source.buckets:
            break
    served = torch.cat(served)
    total = sum(len(row.ids) - 1 for row in few)
    assert total - source.buckets * 64 < len(served) <= total
    bos = miniature.run("a", read=[Site.parse("2.resid_post")])[Site.parse("2.resid_post")][0, 0]
    assert torch.cdist(served, bos[None]).min() > 1e-2 * bos.norm()
    found = (torch.cdist(wanted, served).amin(1) < 1e-2 * wanted.norm(dim=1)).float().mean()
    assert found > 0.7


def test_neighbours_in_the_text_are_not_neighbours_in_the_stream(miniature, rows):
    x, _ = stream(miniature, rows[:100]).first_bucket()
    x = x - x.mean(0)
    along = torch.nn.functional.cosine_similarity(x[:-1], x[1:]).mean()
    site = Site.parse("2.resid_post")
    text = miniature.tokenizer.decode(rows[0].ids[1:])
    y = miniature.run(text, read=[site])[site][0, 1:]
    y = y - y.mean(0)
    in_text = torch.nn.functional.cosine_similarity(y[:-1], y[1:]).mean()
    assert abs(along) < 0.05 < in_text


def advanced(trainer, steps):
    batches = trainer.stream.batches(trainer.position)
    return [trainer.advance(next(batches)) for _ in range(steps)]


def test_after_every_step_rows_are_unit_and_thresholds_positive(miniature, rows, tmp_path):
    trainer = Trainer(config(tmp_path), stream(miniature, rows))
    for _ in range(5):
        advanced(trainer, 1)
        norms = trainer.dictionary.w_dec.detach().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(64), rtol=1e-6, atol=1e-6)
        assert trainer.dictionary.threshold.min() > 0
        assert trainer.dictionary.threshold.dtype == torch.float32


def test_training_learns_and_reaches_its_l0(miniature, rows, tmp_path):
    chosen = config(tmp_path, data__tokens=512 * 250, sparsity__coefficient=0.05)
    trainer = Trainer(chosen, stream(miniature, rows))
    progress = advanced(trainer, 250)
    early = sum(p.fvu for p in progress[:10]) / 10
    late = progress[-10:]
    assert sum(p.fvu for p in late) / 10 < 0.8 * early
    assert sum(p.l0 for p in late) / 10 == pytest.approx(8, rel=0.15)


def test_the_coefficient_changes_the_path(miniature, rows, tmp_path):
    ends = []
    for coefficient in (0.0, 0.1):
        chosen = config(tmp_path, sparsity__coefficient=coefficient, data__tokens=512 * 60)
        ends.append(advanced(Trainer(chosen, stream(miniature, rows)), 60)[-1].l0)
    assert abs(ends[1] - 8) < abs(ends[0] - 8)


def test_the_learning_rate_follows_the_recipe(miniature, rows, tmp_path):
    trainer = Trainer(config(tmp_path), stream(miniature, rows))
    rates = []
    for step in range(trainer.config.steps):
        trainer.step = step
        rates.append(trainer._rate() / 1e-3)
    assert rates[0] == pytest.approx(0.1)
    assert rates[3:12] == pytest.approx([1.0] * 9)
    assert rates[-1] == pytest.approx(1 / 12)


def test_a_full_disk_keeps_the_last_checkpoint(miniature, rows, tmp_path, monkeypatch):
    trainer = Trainer(config(tmp_path), stream(miniature, rows))
    (progress,) = advanced(trainer, 1)
    trainer.save(tmp_path, progress)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; the one before it"):
        trainer.save(tmp_path, progress)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_positions_begin_at_the_beginning():
    assert Position() == Position(0, 0)


def test_numbers_may_be_written_as_everyone_writes_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"out": "x"}).replace("lr: 0.001", "lr: 1e-3"))
    assert "1e-3" in file.read_text()
    assert read_config(file).optimizer.lr == 1e-3
    assert read_config(file, ["optimizer.lr=2E-4"]).optimizer.lr == 2e-4


def test_what_is_read_must_come_before_what_is_written(tmp_path):
    with pytest.raises(InputError, match=r"reads 3\.resid_post comes after writes 2\.resid_post"):
        config(tmp_path, reads="3.resid_post")


def test_a_transcoder_begins_with_features_that_explain_something():
    """After alignment the features reduce the error; before, they add to it."""
    g = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(400, 12, generator=g), dim=1)
    y = torch.tanh(3 * x @ torch.randn(12, 12, generator=g)) / math.sqrt(12)
    made = initial(
        12, 40, 12, transcoder=True, affine=False, centre=y.mean(0), threshold=0.1, generator=g
    )
    made.threshold.copy_(measured_thresholds(made, x, 6.0))

    def error():
        return (made(x, 0.05).y - y).square().sum(1).mean()

    variance = (y - y.mean(0)).square().sum(1).mean()
    assert error() > variance
    fired = made(x, 0.05).active
    align(made, x, y)
    assert error() < 0.95 * variance
    # Scaling moves no feature across its threshold, but for the token that is the threshold.
    assert (made(x, 0.05).active == fired).float().mean() > 0.99
    torch.testing.assert_close(made.w_dec.norm(dim=1), torch.ones(40))
