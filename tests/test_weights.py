"""The published check values, on the published weights, where a machine has them.

    gemscope download gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium --with-model
    pytest -m weights

Figures are those of the official Gemma Scope 2 notebook, of gemma-3-1b-pt in float32; its cells ran
on another machine and another version, so they are compared within 2%, and losses within 0.01.
"""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.weights

MODEL = "google/gemma-3-1b-pt"
RESIDUAL = "gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium"
CROSSCODER = "gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_262k_l0_medium"
CLT = "gemma-scope-2-1b-pt/clt/width_262k_l0_big_affine"
PROMPT = (
    "The law of conservation of energy states that energy cannot be created or destroyed, "
    "only transformed."
)
# Features above 1 on each token after BOS, and the strongest feature of each token.
PER_TOKEN = [14, 55, 88, 50, 85, 52, 68, 98, 86, 88, 115, 72, 61, 50, 58, 90, 70, 58]
STRONGEST = [
    1904, 4489, 990, 62854, 195, 773, 1665, 1643, 6524, 50465, 2622, 1138, 643, 1138, 119, 3419,
    1138, 7188, 1604,
]  # fmt: skip


@pytest.fixture(scope="module")
def gemma():
    from gemscope.errors import InputError
    from gemscope.lm import load_model

    try:
        return load_model(MODEL, device="cpu", dtype="float32")
    except InputError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def residual_65k():
    return loaded(RESIDUAL)


def loaded(address):
    from gemscope import hub

    entry = hub.locate(address)
    if entry.path is None:
        pytest.skip(f"not here: gemscope download {address} --with-model")
    return hub.build(entry)


def test_the_notebooks_prompt_gives_its_figures(gemma, residual_65k):
    run = gemma.run(PROMPT, read=[residual_65k.reads])
    features = residual_65k.encode(run[residual_65k.reads][0, 1:])
    above = [sum(v > 1 for _, v in row) for row in features.top(10_000)]
    assert sum(above) / len(above) == pytest.approx(69.89, rel=0.02)
    assert above == pytest.approx(PER_TOKEN, abs=2)
    strongest = [row[0][0] for row in features.top(1)]
    # The notebook's list begins with BOS.
    assert sum(a == b for a, b in zip(strongest, STRONGEST[1:], strict=True)) >= 16


def test_feature_6524_is_about_entropy(gemma, residual_65k):
    logits = gemma.direct_logits(residual_65k.rows([6524])[:, 0], residual_65k.writes)
    best = [gemma.tokenizer.decode([i]) for i in logits[0].topk(10).indices.tolist()]
    assert {" entropy", " Entropy", " enthalpy"} <= set(best)


@pytest.mark.parametrize("address", [RESIDUAL, CROSSCODER, CLT])
def test_check_finds_the_published_figures(command, address):
    loaded(address)
    code, out, err = command("check", address, "--dtype", "float32", "--json")
    found = json.loads(out)
    assert code == 0, (err, [f for f in found["figures"] if not f["fits"]])
    assert any("its prompt" in figure["name"] for figure in found["figures"])


def test_loading_costs_no_request(residual_65k):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert Path(residual_65k.origin.address).name.startswith("layer_22")
