"""Artefacts in the layouts that SAELens reads as well, tiny, in a cache of the hub.

`test_saelens.py` reads them with gemscope, `saelens_reference.py` with SAELens.
"""

import math

import numpy as np
import torch
import transformers as hf
from golden_layouts import llama_scope

from gemscope import formats

D, F, TOKENS = 16, 24, 6
COMMIT = "0" * 40
GEMMA_SCOPE_2 = "google/gemma-scope-2-1b-pt"
TRANSCODER = "gemma-scope-2-1b-pt/transcoder_all/layer_1_width_16k_l0_small_affine"
CLT = "clt/width_262k_l0_medium_affine"
CROSSCODER = "crosscoder/layer_7_13_17_22_width_65k_l0_medium"
ADDRESSES = {
    "gemma-scope residual": "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
    "gemma-scope mlp": "gemma-scope-2b-pt-mlp/layer_0/width_16k/average_l0_119",
    "gemma-scope embedding": "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
    "gemma-scope-2 residual": "gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium",
    "gemma-scope-2 mlp": "gemma-scope-2-1b-pt/mlp_out/layer_13_width_16k_l0_medium",
    "gemma-scope-2 transcoder": TRANSCODER,
    "llama-scope unit rows": "llama-scope/L15R-8x",
    "llama-scope": "llama-scope/L16R-8x",
}
RELEASES = {
    "gemma-scope-2b-pt-res": "google/gemma-scope-2b-pt-res",
    "gemma-scope-2b-pt-mlp": "google/gemma-scope-2b-pt-mlp",
    "gemma-scope-2-1b-pt": GEMMA_SCOPE_2,
}
LLAMA_SCOPE = "fnlp/Llama3_1-8B-Base-LXR-8x"
NORMS = {"llama-scope unit rows": (15, 10.8125 / 16), "llama-scope": (16, 12.125 / 16)}
"""Layer, and the published mean norm for a width of 16 instead of 4,096: the scale is the same."""
HEIGHT = 2.75
"""Llama Scope's threshold, of all features."""
HOOKS = {
    "resid_post": ("model.layers.{}.output",) * 2,
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output",) * 2,
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm.output",
        "model.layers.{}.post_feedforward_layernorm.output",
    ),
}
SIZES = {
    "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32,
    "attn_implementation": "eager",
}  # fmt: skip
MODELS = {
    "gemma-2": (hf.Gemma2ForCausalLM, hf.Gemma2Config),
    "gemma-3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig),
}


def drawn(bits, *shape):
    """Numbers between -2 and 2, of twelve bits: the same on every machine, exact in float32."""
    raw = bits.random_raw(math.prod(shape)) >> np.uint64(53)
    return ((raw.astype(np.float64) * 2 - 2047) / 1024).reshape(shape)


def weights(seed, *, features=F, layers=None, skip=False):
    bits = np.random.PCG64(seed)
    shape = (features, D) if layers is None else (features, layers, D)
    w = {"w_enc": drawn(bits, D, features), "b_enc": drawn(bits, features)}
    w |= {"w_dec": drawn(bits, *shape), "b_dec": drawn(bits, D)}
    w["threshold"] = 1 + 2 * abs(drawn(bits, features))
    return w | ({"skip": drawn(bits, D, D)} if skip else {})


def of_llama(seed, lengths):
    """A dictionary of Llama Scope, as stored: decoder rows of exactly these lengths."""
    w = weights(seed)
    del w["threshold"]
    return w | {"w_dec": np.sign(w["w_dec"]) / 4 * lengths[:, None]}


def of_layers(seed, layers, *, skip):
    """Each layer of a multi-layer model; nothing is written to layers before a feature's own."""
    made = [weights(seed + i, features=8, layers=layers, skip=skip) for i in range(layers)]
    for place, w in enumerate(made):
        w["w_dec"][:, :place] = 0
    return made


LENGTHS = {"llama-scope unit rows": np.ones(F), "llama-scope": 0.25 + np.arange(F) * 5 / 32}
WEIGHTS = {name: weights(seed) for seed, name in enumerate(ADDRESSES)}
WEIGHTS["gemma-scope-2 transcoder"] = weights(20, skip=True)
WEIGHTS |= {name: of_llama(seed, LENGTHS[name]) for seed, name in enumerate(NORMS, 30)}
CLT_LAYERS = of_layers(40, 3, skip=True)
CROSSCODER_LAYERS = of_layers(50, 4, skip=False)
X = drawn(np.random.PCG64(60), TOKENS, D)
X_LAYERS = drawn(np.random.PCG64(61), TOKENS, 3, D)
X_CROSSCODER = drawn(np.random.PCG64(62), TOKENS, 4, D)
IDS = np.array([[2, 9, 40, 33, 9, 61]])


def part(w):
    return formats.Part(**{name: torch.from_numpy(value).float() for name, value in w.items()})


def snapshot(root, repo):
    """Where the files of a repository are in the hub's cache at `root`."""
    held = root / f"models--{repo.replace('/', '--')}"
    (held / "refs").mkdir(parents=True, exist_ok=True)
    (held / "refs" / "main").write_text(COMMIT)
    return held / "snapshots" / COMMIT


def write_gemma_scope_2(folder, layers, hooks, kind):
    hook_in, hook_out = hooks
    config = formats.Config(
        hf_hook_point_in=hook_in,
        hf_hook_point_out=hook_out,
        width=sum(len(w["b_enc"]) for w in layers),
        model_name="google/gemma-3-1b-pt",
        architecture="jump_relu",
        l0=6.0,
        affine_connection="skip" in layers[0],
        type=kind,
    )
    formats.write_gemma_scope_2(folder, config, [part(w) for w in layers])


def make(root):
    """All artefacts in a cache of the hub at `root/hub`, the models and the inputs at `root`."""
    cached = root / "hub"
    for name, address in ADDRESSES.items():
        release, _, path = address.partition("/")
        w = WEIGHTS[name]
        if name in NORMS:
            layer, norm = NORMS[name]
            hook = f"blocks.{layer}.hook_resid_post"
            linear = {"encoder.weight": w["w_enc"].T, "encoder.bias": w["b_enc"],
                      "decoder.weight": w["w_dec"].T, "decoder.bias": w["b_dec"]}  # fmt: skip
            llama_scope(
                snapshot(cached, LLAMA_SCOPE) / f"Llama3_1-8B-Base-L{layer}R-8x",
                {n: torch.from_numpy(v).float() for n, v in linear.items()},
                d_sae=F, hook_point_in=hook, hook_point_out=hook, jump_relu_threshold=HEIGHT,
                dataset_average_activation_norm={"in": norm, "out": norm},
            )  # fmt: skip
            continue
        folder = snapshot(cached, RELEASES[release]) / path
        if release.startswith("gemma-scope-2b"):
            formats.write_gemma_scope(folder, part(w))
            continue
        stream = path.split("/")[0].removesuffix("_all")
        layer = path.split("layer_")[1].split("_")[0]
        hooks = [hook.format(layer) for hook in HOOKS[stream]]
        write_gemma_scope_2(folder, [w], hooks, "transcoder" if "skip" in w else "sae")
    there = snapshot(cached, GEMMA_SCOPE_2)
    hooks = [hook.format("{all}") for hook in HOOKS["transcoder"]]
    write_gemma_scope_2(there / CLT, CLT_LAYERS, hooks, "clt")
    write_gemma_scope_2(
        there / CROSSCODER, CROSSCODER_LAYERS, ["model.layers.{7,13,17,22}.output"] * 2,
        "crosscoder",
    )  # fmt: skip
    for name in MODELS:
        tiny(name).save_pretrained(root / name)
    np.save(root / "x.npy", X.astype(np.float32))
    np.save(root / "layers.npy", X_LAYERS.astype(np.float32))
    np.save(root / "ids.npy", IDS)
    np.save(root / "sizes.npy", np.array([D, F]))
    return root


def tiny(name):
    """A model of two layers, with no gain of one and no weight of zero."""
    made, config = MODELS[name]
    model = made(config(**SIZES))
    bits = np.random.PCG64(70)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(drawn(bits, *parameter.shape) / 4))
    return model.eval().requires_grad_(False)
