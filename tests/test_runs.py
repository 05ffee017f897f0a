"""Training runs from end to end: what they leave, and that nothing is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from training import KINDS, SAE, advanced, config, equal, planted, trainer, weights

from gemscope import formats
from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.train import Stopped, train
from gemscope.train import _run as run_module
from gemscope.train._checkpoint import Checkpoints


class Killed(Exception):  # noqa: N818
    """What ends a process."""


def killed_at(step):
    def report(progress):
        if progress.step == step:
            raise Killed

    return report


@pytest.mark.parametrize("step", [10, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, 17))])
def test_every_kind_goes_on_bit_equal(step, tmp_path):
    """Killed and begun again from what was saved, all of it is as if nothing had happened."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer(config(whole, *KINDS)).train(whole)
    chosen = config(parts, *KINDS)
    with pytest.raises(Killed):
        trainer(chosen).train(parts, report=killed_at(step))
    run = trainer(chosen)
    if step > 4:
        run.restore(parts)
        assert run.step == step // 4 * 4
    else:
        assert not Checkpoints(parts).exists()
        remove_metrics(parts)
    run.train(parts)
    again, first = (trainer(config(f, *KINDS)) for f in (parts, whole))
    again.restore(parts)
    first.restore(whole)
    for a, b in zip(again.learners, first.learners, strict=True):
        for name, value in a.tensors().items():
            assert torch.equal(value, b.tensors()[name]), (a.config.name, name)
        ours, theirs = a.state(), b.state()
        ours.pop("seconds")
        theirs.pop("seconds")
        assert ours == theirs
    assert equal(whole, parts) == []


def remove_metrics(folder):
    for file in (folder / "metrics").iterdir():
        file.unlink()


def test_what_the_tests_of_resuming_rely_on_is_there(tmp_path):
    """Dead features, moved aims, and first moments: a checkpoint has to hold them."""
    run = trainer(config(tmp_path / "run", *KINDS))
    advanced(run, 12)
    by_name = {x.config.name: x for x in run.learners}
    assert (by_name["topk"].silent[0] >= 128).any()
    assert by_name["w64-s0"].aim != 8
    assert by_name["batch-topk"].adam.first
    assert len({x.density for x in run.learners}) > 3
    run.save(tmp_path / "run")
    again = trainer(config(tmp_path / "run", *KINDS))
    again.restore(tmp_path / "run")
    assert (again.step, again.position) == (run.step, run.position)
    for a, b in zip(again.learners, run.learners, strict=True):
        assert json.dumps(a.state()) == json.dumps(b.state())
        assert all(torch.equal(v, b.tensors()[n]) for n, v in a.tensors().items())


def test_the_clock_of_a_step_survives(tmp_path):
    chosen = config(tmp_path / "run")
    with pytest.raises(Killed):
        trainer(chosen).train(tmp_path / "run", report=killed_at(9))
    run = trainer(chosen)
    run.restore(tmp_path / "run")
    seconds, sections = run.seconds, dict(run.sections)
    assert seconds > 0
    assert sections["optimizer"] > 0
    seen = []
    run.train(tmp_path / "run", report=seen.append)
    assert seen[0].step == 9
    assert seen[0].tokens == 9 * 128
    assert seen[0].seconds > seconds
    assert seen[0].sections["optimizer"] > sections["optimizer"]


def test_metrics_past_the_checkpoint_are_taken_back(tmp_path):
    chosen = config(tmp_path / "run")
    file = tmp_path / "run" / "metrics" / "sae.jsonl"
    with pytest.raises(Killed):
        trainer(chosen).train(tmp_path / "run", report=killed_at(7))
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    with file.open("a") as log:
        log.write('{"name": "sae", "st')  # as a process that dies leaves it
    trainer(chosen).restore(tmp_path / "run")
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_line_of_metrics_under_way_is_the_same(tmp_path):
    """A checkpoint between two lines holds the sums of the next."""
    told = []
    for parts in ([6], [4, 2]):
        chosen = config(tmp_path / "run", data__tokens=128 * 1_203)
        for n in parts:
            run = trainer(chosen)
            assert run.metrics.every == 3
            if Checkpoints(tmp_path / "run").exists():
                run.restore(tmp_path / "run")
            for measured in advanced_with(run, n):
                run.metrics.add(run.step, measured, tmp_path / "run")
            run.save(tmp_path / "run")
        file = tmp_path / "run" / "metrics" / "sae.jsonl"
        told.append(file.read_text())
        file.unlink()
        Checkpoints(tmp_path / "run").remove()
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 2


def advanced_with(run, steps):
    for _ in range(steps):
        yield advanced(run, 1)[0]


def test_a_checkpoint_half_written_is_none(tmp_path):
    chosen = config(tmp_path / "run")
    with pytest.raises(Killed):
        trainer(chosen).train(tmp_path / "run", report=killed_at(5))
    (whole,) = (tmp_path / "run" / "checkpoint").iterdir()
    part = whole.with_name("step-00000008.part")
    part.mkdir()
    (part / "state.json").write_text("{}")
    run = trainer(chosen)
    run.restore(tmp_path / "run")
    assert run.step == 4
    with pytest.raises(Killed):
        run.train(tmp_path / "run", report=killed_at(9))
    # Of the same name, it is replaced; and of whole ones there is the last.
    assert [f.name for f in part.parent.iterdir()] == ["step-00000008"]


def test_a_checkpoint_without_the_one_before_is_enough(tmp_path):
    """Killed between writing a checkpoint and removing the one before it: the later one counts."""
    chosen = config(tmp_path / "run")
    run = trainer(chosen)
    advanced(run, 2)
    run.save(tmp_path / "run")
    early = tmp_path / "run" / "checkpoint" / "step-00000002"
    kept = early.with_name("kept")
    early.rename(kept)
    advanced(run, 3)
    run.save(tmp_path / "run")
    kept.rename(early)
    again = trainer(chosen)
    again.restore(tmp_path / "run")
    assert again.step == 5


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = trainer(config(tmp_path / "run"))
    advanced(run, 1)
    run.save(tmp_path / "run")
    (whole,) = (tmp_path / "run" / "checkpoint").iterdir()
    before = {f.name: f.read_bytes() for f in whole.iterdir()}
    advanced(run, 1)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device; the one before it"):
            run.save(tmp_path / "run")
    assert [f.name for f in whole.parent.iterdir()] == [whole.name]
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == before


def test_a_checkpoint_of_another_config_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "run"
    run = trainer(config(folder))
    advanced(run, 1)
    run.save(folder)

    def restored(*artefacts, **changes):
        trainer(config(folder, *artefacts, **changes)).restore(folder)

    with pytest.raises(InputError, match=r"sae: optimizer\.lr was 0\.001, is 0\.002; restore"):
        restored(optimizer__lr=2e-3)
    with pytest.raises(InputError, match=r"data\.seed was 0, is 5; sae: l0 was 8\.0, is 9\.0"):
        restored(SAE | {"l0": 9}, data__seed=5)
    with pytest.raises(InputError, match=r"sae: auxk was None, is \{"):
        restored(SAE | {"auxk": {"features": 4}})
    with pytest.raises(InputError, match="artefacts were 1, are 2 or others"):
        restored(SAE, SAE | {"name": "b"})
    restored(checkpoint_every=7)
    (whole,) = (folder / "checkpoint").iterdir()
    for name in ("state.json", "0.safetensors"):
        before = (whole / name).read_bytes()
        for content in (b"nonsense", before[:200], b""):
            (whole / name).write_bytes(content)
            with pytest.raises(InputError, match="is not a checkpoint, or damaged; remove"):
                restored()
        (whole / name).write_bytes(before)
    restored()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    steady = SAE | {"name": "steady", "optimizer": {"lr": 1e-3}}
    chosen = config(tmp_path / "run", steady, SAE, optimizer__lr=1e30)
    run = trainer(config(tmp_path / "run", steady, SAE))
    advanced(run, 1)
    run.save(tmp_path / "run")
    before = [f.read_bytes() for f in sorted((tmp_path / "run").rglob("*")) if f.is_file()]
    run = trainer(chosen)
    with pytest.raises(
        InputError, match=r"sae diverged: its loss is (nan|inf) at step \d+; lower its optim"
    ):
        run.train(tmp_path / "run")
    kept = [f for f in sorted((tmp_path / "run" / "checkpoint").rglob("*")) if f.is_file()]
    assert [f.read_bytes() for f in kept] == before


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    run = trainer(config(tmp_path / "run"))
    advanced(run, 1)
    run.learners[0].weights.b_enc[0][3] = torch.nan
    with pytest.raises(InputError, match=r"sae diverged: b_enc\.0 is not finite"):
        run.save(tmp_path / "run")
    assert not Checkpoints(tmp_path / "run").exists()


def test_the_artefact_is_the_trained_function(miniature, tmp_path):
    """Folded, saved and loaded, every kind does to raw activations what was trained."""
    chosen = config(tmp_path / "run", *KINDS)
    run = trainer(chosen)
    advanced(run, 6)
    raw = planted()
    for learner in run.learners:
        a, w, s = learner.config, learner.weights, learner.scales
        made = run_module.write_artefact(tmp_path / a.name, learner, chosen, miniature)
        assert made is None
        reads, writes = ([*x] if isinstance(x, tuple) else [x] for x in (a.reads, a.writes))
        parts = formats.read(tmp_path / a.name)
        outs = [0.0] * len(writes)
        for i, (part, site) in enumerate(zip(parts, reads, strict=True)):
            x = raw[site][:300]
            z = x @ part.w_enc + part.b_enc
            mine = w.pre_activations(i, x / s.c_in[i]) * s.c_out[i]
            torch.testing.assert_close(z, mine, rtol=1e-4, atol=1e-4 * float(z.abs().max()))
            if a.activation == "topk":
                f = torch.zeros_like(z).scatter(1, z.topk(3).indices, z.topk(3).values).relu()
            else:
                torch.testing.assert_close(part.threshold, w.threshold[i] * s.c_out[i])
                f = z * (z > part.threshold)
            for m, c in enumerate(s.c_out[i:], start=i):
                rows = w.w_dec[i][:, (m - i) * 32 : (m - i + 1) * 32]
                trained = f / s.c_out[i] @ rows * c
                held = part.w_dec if len(parts) == 1 else part.w_dec[:, m]
                torch.testing.assert_close(f @ held, trained, rtol=1e-4, atol=1e-3)
                outs[m] = outs[m] + f @ held
            outs[i] = outs[i] + part.b_dec
            if a.affine:
                outs[i] = outs[i] + x @ part.skip
                skip = x / s.c_in[i] @ w.skip[i] * s.c_out[i]
                torch.testing.assert_close(x @ part.skip, skip, rtol=1e-4, atol=1e-3)
        y = torch.cat([raw[site][:300] for site in writes], 1)
        missed = (torch.cat(outs, 1) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert 0 < float(missed) < 2, a.name  # after six steps


def test_a_run_leaves_a_release(miniature, tmp_path):
    affine = {"name": "transcoder/a", "reads": "2.mlp_in", "writes": "2.mlp_out", "d_sae": 64,
              "l0": 8, "affine": True}  # fmt: skip
    chosen = config(tmp_path / "run", SAE, affine, data__tokens=8 * 128)
    seen = []
    folder = train(chosen, model=miniature, report=seen.append)
    assert [p.step for p in seen] == list(range(1, 9))
    assert (seen[-1].steps, seen[-1].tokens) == (8, 1_024)
    assert [s.name for s in seen[-1].standings] == ["sae", "transcoder/a"]
    sae = load_sae(str(folder / "sae"))
    assert (sae.reads, sae.writes, sae.d_sae) == (chosen.sites[0], chosen.sites[0], 64)
    assert sae.origin.model == miniature.name
    assert sae.origin.l0 == 8
    other = load_sae(str(folder / "transcoder" / "a"))
    assert other.is_transcoder
    assert other.skip.abs().max() > 0
    assert formats.read_config(folder / "transcoder/a").hf_hook_point_in == (
        "model.layers.2.pre_feedforward_layernorm.output"
    )
    assert {"config.yaml", "metrics", "run.json", "report.html"} <= {
        f.name for f in folder.iterdir()
    }
    assert not (folder / "checkpoint").exists()
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert again["artefacts"][0]["name"] == "sae"
    with pytest.raises(InputError, match="is finished; choose another out"):
        train(chosen, model=miniature)
    third = SAE | {"name": "third"}
    with pytest.raises(InputError, match="holds sae already; choose another out"):
        train(config(tmp_path / "run", SAE, third), model=miniature)


def test_an_end_that_is_interrupted_is_gone_through_again(miniature, tmp_path, monkeypatch):
    """Killed after some artefacts are written: run again, the others are, too."""
    few = {"data__tokens": 3 * 128}
    whole = train(config(tmp_path / "whole", SAE, KINDS[-2], **few), model=miniature)
    write, written = run_module.write_artefact, []

    def once(folder, *rest):
        if written:
            raise Killed
        written.append(write(folder, *rest))

    chosen = config(tmp_path / "parts", SAE, KINDS[-2], **few)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_artefact", once)
        with pytest.raises(Killed):
            train(chosen, model=miniature)
    assert (tmp_path / "parts" / "sae").is_dir()
    parts = train(chosen, model=miniature, resume=True)
    assert equal(whole, parts) == []
    for name in ("sae", "crosscoder"):
        ours, theirs = weights(whole / name), weights(parts / name)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_in_progress(miniature, tmp_path, signum):
    chosen = config(tmp_path / "run", checkpoint_every=100)
    seen = []

    def report(progress):
        seen.append(progress.step)
        if progress.step == 5:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match=r"stopped at step \d of 24; .*: run the same") as stopped:
        train(chosen, model=miniature, report=report)
    assert signal.getsignal(signum) is before
    assert stopped.value.signum == signum
    assert seen[-1] <= 6, "within one step"
    steps = []
    train(chosen, model=miniature, resume=True, report=lambda p: steps.append(p.step))
    assert steps[0] == seen[-1] + 1


def started(out):
    few = [k for k in KINDS if k["name"] in ("sae", "topk", "batch-topk", "crosscoder")]
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config(out, *few).model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "gemscope", "train", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the command that nobody stopped."""
    out = tmp_path_factory.mktemp("command") / "whole"
    run = started(out)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_loses_nothing(whole, signum):
    """The command, stopped from outside and run again, ends bit-equal to one left alone."""
    parts = whole.with_name(f"stopped-by-{signum}")
    broken = started(parts)
    while not Checkpoints(parts).exists():
        assert broken.poll() is None, broken.communicate()[1]
        time.sleep(0.02)
    broken.send_signal(signum)
    _, stderr = broken.communicate(timeout=300)
    if broken.returncode != 0:  # it may have been faster than the signal
        assert broken.returncode == (-9 if signum == signal.SIGKILL else 128 + signum)
        assert "Traceback" not in stderr
        if signum != signal.SIGKILL:
            assert "run the same command to go on" in stderr
        again = started(parts)
        _, stderr = again.communicate(timeout=300)
        assert again.returncode == 0, stderr
    assert equal(whole, parts) == []
