"""Folders in other libraries' layouts, made by hand, and what those libraries compute with them.

The functions ending in `_unfolded` follow each library's own definition, step by step and in
float64: activations are scaled and biases subtracted where the library does it, nothing is folded.
Each gives `(features, reconstruction)`, a feature in the units that folding gives it.
"""

import json
import math
import struct

import pytest
import torch

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sae import SAE, JumpReLU, ReLU, TopK
from gemscope.sites import Site, Stream

D, F, OUT = 16, 48, 12
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
RESID = Site(5, Stream.RESID_POST)
ROUNDING = 2.0**-24
"""Of one operation in float32, relative."""
HOOK = "blocks.5.hook_resid_post"
MLP_IN, MLP_OUT = "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out"

LLAMA = {
    "d_model": D, "d_sae": F, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "jumprelu",
    "jump_relu_threshold": 0.35, "norm_activation": "dataset-wise", "use_decoder_bias": True,
    "dataset_average_activation_norm": {"in": 10.5, "out": 10.5}, "use_glu_encoder": False,
    "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "top_k": 7,
}  # fmt: skip
TRANSCODER = {
    "hook_point_in": MLP_IN, "hook_point_out": MLP_OUT,
    "dataset_average_activation_norm": {"in": 64.0, "out": 3.4},
}  # fmt: skip
R1 = {
    "sae_type": "sae", "d_model": D, "expansion_factor": F // D, "hook_point_in": HOOK,
    "hook_point_out": HOOK, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
    "use_decoder_bias": True, "use_glu_encoder": False, "sparsity_include_decoder_norm": True,
    "apply_decoder_bias_to_pre_encoder": False, "top_k": 7,
}  # fmt: skip
SAELENS = {
    "architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "gemma-2-2b", "hook_name": HOOK,
                 "hook_head_index": None},
}  # fmt: skip
SPARSIFY = {
    "activation": "topk", "expansion_factor": F // D, "normalize_decoder": True, "num_latents": F,
    "k": 7, "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D,
}  # fmt: skip
TRAINER = {
    "trainer_class": "Trainer", "dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F,
    "k": 7, "layer": 5, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_5",
}  # fmt: skip


WRONG = (
    None, [], {}, "x", "", "a\nb", 0, -1, 0.5, True, math.nan, math.inf, 10**400, 1e308, 5e-324,
    [1], {"in": "x"}, {"in": 5e-324, "out": 1e308}, {"in": 1e308, "out": 5e-324},
)  # fmt: skip
"""What may stand in a configuration where something else belongs."""


def refused(folder, match):
    """Reading `folder` ends in one sentence that matches."""
    with pytest.raises(InputError, match=match) as raised:
        formats.read(folder)
    assert "\n" not in str(raised.value)


def told(folder):
    """What is wrong with `folder`, or nothing if it is read."""
    try:
        formats.read(folder)
    except InputError as error:
        return str(error)
    return None


def drawn(seed=0, *, out=D):
    """Weights of a dictionary, decoder rows of many lengths, and inputs to try it on."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.linspace(0.2, 3.0, F)[:, None]
    w_dec = normal(F, out)
    return {
        "w_enc": normal(D, F),
        "b_enc": normal(F),
        "w_dec": w_dec / w_dec.norm(dim=1, keepdim=True) * lengths,
        "b_dec": normal(out),
        "threshold": normal(F).abs(),
        "skip": normal(D, out),
    }, normal(64, D)


def stored(tensors):
    """The bytes of a safetensors file, by the letter of its format and without its library."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1)
        raw = bytes(flat.view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = offsets
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _place(folder, config_name, config, weights_name, weights):
    (folder / weights_name).parent.mkdir(parents=True, exist_ok=True)
    (folder / weights_name).write_bytes(weights if isinstance(weights, bytes) else stored(weights))
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / config_name).write_text(text)
    return folder


def linear(w, *, bias="decoder.bias"):
    """Weights of `drawn` under the names of linear modules."""
    return {
        "encoder.weight": w["w_enc"].T, "encoder.bias": w["b_enc"],
        "decoder.weight": w["w_dec"].T, bias: w["b_dec"],
    }  # fmt: skip


def capital(w, *others):
    """Weights of `drawn` under the names that SAELens gives them."""
    named = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec"}
    return {n: w[ours] for n, ours in named.items()} | {n: w[n] for n in others}


def llama_scope(folder, tensors, **changes):
    weights = "checkpoints/final.safetensors"
    return _place(folder, "hyperparams.json", LLAMA | changes, weights, tensors)


def r1_distill(folder, tensors, **changes):
    return _place(folder, "config.json", R1 | changes, "sae_weights.safetensors", tensors)


def saelens(folder, tensors, config=None, **changes):
    config = (SAELENS if config is None else config) | changes
    return _place(folder, "cfg.json", config, "sae_weights.safetensors", tensors)


def sparsify(folder, tensors, **changes):
    return _place(folder, "cfg.json", SPARSIFY | changes, "sae.safetensors", tensors)


def dictionary_learning(folder, state, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    config = {"trainer": TRAINER | changes, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_sae(part):
    """The dictionary of a part, at a site that does not matter."""
    if part.threshold is not None:
        activation = JumpReLU(part.threshold.float())
    else:
        activation = ReLU() if part.k is None else TopK(part.k)
    weights = {n: getattr(part, n) for n in ("w_enc", "b_enc", "w_dec", "b_dec", "skip")}
    reads, writes = Site(5, Stream.MLP_IN), Site(5, Stream.MLP_OUT)
    return SAE(**weights, activation=activation, reads=reads, writes=writes)


def openmoss_unfolded(x, tensors, config, norm_in, norm_out, *, thresholds=None):
    """Llama Scope and its successor: activations scaled to a mean norm of `sqrt(d_model)`.

    With `thresholds`, those of the features at that scale (R1); without, the one number of Llama
    Scope, which counts in raw units for decoder rows of length 1.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    scale_in, scale_out = (math.sqrt(config["d_model"]) / norm for norm in (norm_in, norm_out))
    b_dec = t.get("decoder.bias", torch.zeros(config["d_model"]).double())
    scaled = x.double() * scale_in
    if config["apply_decoder_bias_to_pre_encoder"]:
        scaled = scaled - b_dec
    hidden = scaled @ t["encoder.weight"].T + t["encoder.bias"]
    by_norm = config["sparsity_include_decoder_norm"]
    length = t["decoder.weight"].norm(dim=0) if by_norm else torch.ones(len(t["encoder.bias"]))
    score = hidden * length
    if config["act_fn"] == "topk":
        height = score.topk(config["top_k"], dim=1).values[:, -1:].clamp_min(1e-300)
        active = score >= height
    elif config["act_fn"] == "relu":
        active = score > 0
    elif thresholds is not None:
        active = score > thresholds.double()
    else:
        raw = (t["decoder.weight"] * scale_in / scale_out).norm(dim=0) if by_norm else 1.0
        active = hidden > config["jump_relu_threshold"] * scale_in / raw
    y = ((hidden * active) @ t["decoder.weight"].T + b_dec) / scale_out
    # What folding makes of a feature: raw activations in, decoder rows of length 1 out.
    unit = length / scale_out if by_norm else 1 / scale_in
    return hidden * active * unit, y


def plain_unfolded(x, w, *, less_bias=False, by_norm=False, threshold=None, k=None, skip=False):
    """SAELens, sparsify and dictionary_learning: an encoder that may take `b_dec` from its input,
    and TopK that may weight features by the length of their decoder rows.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    x = x.double()
    hidden = (x - w["b_dec"] if less_bias else x) @ w["w_enc"] + w["b_enc"]
    length = w["w_dec"].norm(dim=1) if by_norm else torch.ones(w["w_dec"].shape[0]).double()
    hidden = (hidden * length).relu()
    if threshold is not None:
        hidden = hidden * (hidden > threshold.double())
    if k is not None:
        hidden = hidden * (hidden >= hidden.topk(k, dim=1).values[:, -1:])
    y = (hidden / length) @ w["w_dec"] + w["b_dec"]
    return hidden, y + x @ w["skip"] if skip else y


def agrees(part, x, wanted):
    """Same active features, and values within what float32 can be off by.

    A sum of n products is off by at most n + 1 roundings of the sum of their magnitudes; folding
    adds at most 4 to each weight.
    """
    sae, (features, y) = as_sae(part), wanted
    found = sae.encode(x).dense()
    assert torch.equal(found != 0, features != 0)
    assert 0 < (features != 0).double().mean() < 0.9
    magnitudes = x.double().abs() @ part.w_enc.double().abs() + part.b_enc.double().abs()
    off = (D + 6) * ROUNDING * magnitudes
    assert ((found.double() - features).abs() <= off).all()
    w_dec = part.w_dec.double().abs()
    total = features.abs() @ w_dec + part.b_dec.double().abs()
    if part.skip is not None:
        total += x.double().abs() @ part.skip.double().abs()
    off_y = (F + D + 6) * ROUNDING * total + (off * (features != 0)) @ w_dec
    assert ((sae.reconstruct(x).double() - y).abs() <= off_y).all()


def only(folder):
    (part,) = formats.read(folder)
    return part


def tensor(*rows):
    return torch.tensor(rows)
