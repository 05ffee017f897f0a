"""From a hub to a report: a fabricated `google/gemma-scope-2-1b-pt` and its model, served on this
machine, downloaded, checked and evaluated by the command, with the hub's real client.
"""

import json
import subprocess
import sys

import pytest
import torch
from loopback import Fault, Hub

from gemscope import formats, miniature

SCOPE, MODEL = "google/gemma-scope-2-1b-pt", "google/gemma-3-1b-pt"
SUITE = "resid_post/layer_22_width_65k_l0_medium"
CLT = "clt/width_262k_l0_medium"
ADDRESS = f"gemma-scope-2-1b-pt/{SUITE}"
N_LAYERS, D_MODEL = 26, 1152

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """A model of the right depth and width with next to nothing inside, and two artefacts."""
    root = tmp_path_factory.mktemp("served")
    make_model(root / "model")
    g = torch.Generator().manual_seed(0)
    config = formats.Config(
        hf_hook_point_in="model.layers.22.output", hf_hook_point_out="model.layers.22.output",
        width=256, model_name="gemma-v3-1b-pt", architecture="jump_relu", l0=60.0,
        affine_connection=False, type="sae",
    )  # fmt: skip
    formats.write_gemma_scope_2(root / "scope" / SUITE, config, [part(g, 256)])
    (root / "scope" / SUITE / "examples.safetensors").write_bytes(b"examples" * 1_000)
    many = formats.Config(
        hf_hook_point_in="model.layers.{all}.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.{all}.post_feedforward_layernorm.output",
        width=8 * N_LAYERS, model_name="gemma-v3-1b-pt", architecture="jump_relu", l0=50.0,
        affine_connection=False, type="clt",
    )  # fmt: skip
    layers = [part(g, 8, place) for place in range(N_LAYERS)]
    formats.write_gemma_scope_2(root / "scope" / CLT, many, layers)
    return {SCOPE: root / "scope", MODEL: root / "model"}


def make_model(folder):
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(miniature.MODEL)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, num_hidden_layers=N_LAYERS,
        intermediate_size=16, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=128, sliding_window=64,
    )  # fmt: skip
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def part(g, width, place=None):
    rows = torch.nn.functional.normalize(torch.randn(width, D_MODEL, generator=g), dim=1)
    w_dec = rows
    if place is not None:
        w_dec = torch.zeros(width, N_LAYERS, D_MODEL)
        w_dec[:, place:] = rows[:, None] / N_LAYERS
    return formats.Part(
        w_enc=rows.T.contiguous(), b_enc=torch.zeros(width), w_dec=w_dec,
        b_dec=torch.zeros(D_MODEL), threshold=torch.full((width,), 0.01),
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(repos):
    with Hub(repos) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def gemscope(served, home, tmp_path):
    def run(*arguments, **environment):
        served.log.clear()
        return subprocess.run(
            [sys.executable, "-m", "gemscope", *map(str, arguments)],
            env=served.environment(home, **environment),
            cwd=tmp_path, capture_output=True, text=True, timeout=170,
        )  # fmt: skip

    return run


def test_a_gated_model_is_told_before_anything_runs(gemscope, served):
    served.faults[MODEL] = Fault("gated")
    try:
        done = gemscope("eval", ADDRESS, "--tokens", 50)
    finally:
        served.faults.clear()
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"https://huggingface.co/{MODEL}" in last
    assert "accept its licence" in last
    assert "Traceback" not in done.stderr


def test_download_then_evaluate_without_a_request(gemscope, served, tmp_path):
    done = gemscope("download", ADDRESS, "--with-model")
    assert done.returncode == 0, done.stderr
    done = gemscope("eval", ADDRESS, "--tokens", 200, "--context", 64, "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert served.log == []
    found = json.loads(done.stdout)
    assert (found["address"], found["d_sae"], found["tokens"]) == (ADDRESS, 256, 200)
    assert found["provenance"]["model"] == MODEL
    assert found["published"]["l0"] == 69.89
    assert (tmp_path / found["report"]).is_file()
    # Neither does anything when the network is there: what is in the cache is believed.
    assert gemscope("info", ADDRESS, "--json").returncode == 0
    assert served.log == []


def test_check_says_that_random_numbers_do_not_fit(gemscope):
    done = gemscope("check", ADDRESS, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert not figures["FVU"]["fits"]
    assert not figures["fvu_global, its prompt"]["fits"]


def test_a_cross_layer_transcoder_is_fetched_when_it_is_needed(gemscope, served):
    address = f"gemma-scope-2-1b-pt/{CLT}"
    done = gemscope("eval", address, "--tokens", 60, "--context", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["reads"], found["d_sae"]) == ("clt", "0-25.mlp_in", 8 * N_LAYERS)
    assert len(found["layers"]) == N_LAYERS
    assert not [r for r in served.log if "examples" in r.path]
    done = gemscope("look", "def f(x):", "--sae", address, "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    layers = {f["layer"] for row in json.loads(done.stdout)["features"] for f in row}
    assert layers <= set(range(N_LAYERS))
    assert layers


def test_a_model_of_another_depth_is_refused(gemscope):
    done = gemscope("look", "def f(x):", "--sae", ADDRESS, "--model", "miniature")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"belongs to {MODEL}, not to gemscope/miniature" in done.stderr
