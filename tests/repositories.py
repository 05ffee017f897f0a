"""Artefacts as a hub has them, small."""

import torch

from gemscope import formats

REPO, MODEL, OTHER = "google/gemma-scope-2-1b-pt", "google/gemma-3-1b-pt", "someone/dictionaries"
SMALL, BARE, LARGE = (
    "resid_post/layer_22_width_16k_l0_small",
    "resid_post/layer_13_width_16k_l0_small",
    "resid_post/layer_22_width_65k_l0_medium",
)
ADDRESS = f"gemma-scope-2-1b-pt/{SMALL}"
PARAMS = f"{REPO}/{SMALL}/params.safetensors"
CONFIG = f"{REPO}/{SMALL}/config.json"


def write(folder, *, d_in=4, width=8):
    hook = "model.layers.22.output"
    config = formats.Config(
        hf_hook_point_in=hook, hf_hook_point_out=hook, width=width, model_name=MODEL,
        architecture="jump_relu", l0=2.0, affine_connection=False, type="sae",
    )  # fmt: skip
    part = formats.Part(
        w_enc=torch.rand(d_in, width), b_enc=torch.zeros(width), threshold=torch.ones(width),
        w_dec=torch.rand(width, d_in), b_dec=torch.zeros(d_in),
    )  # fmt: skip
    formats.write_gemma_scope_2(folder, config, [part])
    (folder / "examples.safetensors").write_bytes(b"examples" * 1000)
