"""Training runs from end to end: what they leave, and that nothing is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from training import CONFIG, config, weights

from gemscope import formats
from gemscope.activations import ActivationStream
from gemscope.corpus import contexts, read_text
from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.train import read_config, smoke_test, train


def test_an_interrupted_run_ends_bit_equal(miniature, tmp_path):
    whole = train(config(tmp_path / "whole"), model=miniature)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(progress):
        if progress.step == 10:  # two steps after a checkpoint
            raise Killed

    with pytest.raises(Killed):
        train(config(tmp_path / "parts"), model=miniature, report=kill)
    steps = []
    parts = train(
        config(tmp_path / "parts"),
        model=miniature,
        resume=True,
        report=lambda p: steps.append(p.step),
    )
    assert steps[0] == 9
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name


def test_the_artefact_is_the_trained_function(miniature, tmp_path):
    chosen = config(tmp_path)
    last = []
    artefact = train(chosen, model=miniature, report=last.append)
    sae = load_sae(str(artefact))
    assert (sae.reads, sae.writes, sae.d_sae) == (chosen.reads, chosen.writes, 64)
    assert sae.origin.model == miniature.name
    assert sae.origin.l0 == 8
    rows_ = list(contexts(read_text("miniature"), miniature.tokenizer, length=64))
    source = ActivationStream(
        miniature, rows_, chosen.reads, chosen.writes, batch=512, bucket=2_048, seed=0
    )
    x, _ = source.first_bucket()
    assert sae.encode(x).counts.float().mean().item() == pytest.approx(last[-1].l0, rel=0.3)
    error = (sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error.item() == pytest.approx(last[-1].fvu, rel=0.3)


def test_a_transcoder_with_a_skip_is_trained_and_saved(miniature, tmp_path):
    artefact = train(
        config(tmp_path, reads="2.mlp_in", writes="2.mlp_out", affine=True), model=miniature
    )
    sae = load_sae(str(artefact))
    assert sae.is_transcoder
    assert sae.skip.abs().max() > 0
    assert formats.read_config(artefact).hf_hook_point_in == (
        "model.layers.2.pre_feedforward_layernorm.output"
    )


def test_a_finished_run_is_not_overwritten(miniature, tmp_path):
    artefact = train(config(tmp_path), model=miniature)
    with pytest.raises(InputError, match="is finished; choose another out"):
        train(config(tmp_path), model=miniature)
    assert artefact.is_dir()


def test_a_checkpoint_of_another_config_is_refused_with_what_differs(miniature, tmp_path):
    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path), model=miniature, report=stop)
    with pytest.raises(InputError, match=r"optimizer\.lr was 0\.001, is 0\.002"):
        train(config(tmp_path, optimizer__lr=2e-3), model=miniature)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not a checkpoint, or damaged"):
        train(config(tmp_path), model=miniature)


def test_a_loss_that_is_no_number_stops_the_run(miniature, tmp_path):
    with pytest.raises(InputError, match=r"diverged: .* at step \d+; lower optimizer"):
        train(config(tmp_path, optimizer__lr=1e30), model=miniature)
    assert not (tmp_path / "artefact").exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_loses_nothing(tmp_path, signum):
    """The command, stopped from outside and run again, ends bit-equal to one left alone."""
    folders = {}
    for name in ("whole", "parts"):
        raw = json.loads(json.dumps(CONFIG)) | {"out": str(tmp_path / name)}
        raw["data"]["tokens"] = 512 * 60
        folders[name] = tmp_path / f"{name}.yaml"
        folders[name].write_text(yaml.safe_dump(raw))

    def start(name):
        return subprocess.Popen(
            [sys.executable, "-m", "gemscope", "train", str(folders[name])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    whole = start("whole")
    assert whole.wait(timeout=120) == 0
    broken = start("parts")
    checkpoint = tmp_path / "parts" / "checkpoint.safetensors"
    for _ in range(1_000):
        if checkpoint.exists():
            break
        time.sleep(0.05)
    broken.send_signal(signum)
    _, stderr = broken.communicate(timeout=60)
    if broken.returncode != 0:  # it may have been faster than the signal
        assert broken.returncode == (-9 if signum == signal.SIGKILL else 128 + signum)
        assert "Traceback" not in stderr
        if signum != signal.SIGKILL:
            assert "run the same command to go on" in stderr
        again = start("parts")
        assert again.wait(timeout=120) == 0
    for name, value in weights(tmp_path / "whole" / "artefact").items():
        assert torch.equal(value, weights(tmp_path / "parts" / "artefact")[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_shipped_configs_are_valid_and_pass_their_smoke_test(file, miniature, tmp_path):
    chosen = read_config(file, [f"out={tmp_path / 'run'}"])
    if chosen.model != "miniature":
        return
    small = smoke_test(chosen)
    assert load_sae(str(train(small, model=miniature))).d_sae == small.d_sae
