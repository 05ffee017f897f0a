"""A random Gemma and a transcoder for each of its MLPs, for graphs of attribution.

`test_peer_circuits.py` and the benchmark trace it with gemscope and with circuit-tracer.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf

from gemscope import formats, miniature

PROMPT = "def main(arguments):\n    return"


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Numbers between -2 and 2, of twelve bits: the same on every machine, exact in float32."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(52)
    return torch.from_numpy(((raw.astype(np.float32) * 2 - 4095) / 2048).reshape(shape))


def model_of(layers: int, d: int, heads: int, window: int, seed: int) -> hf.Gemma2ForCausalLM:
    """A Gemma 2 whose attention, MLPs and tokens all have a say in what it predicts."""
    config = hf.Gemma2Config(
        hidden_size=d, intermediate_size=3 * d, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=d // heads,
        query_pre_attn_scalar=d // heads, vocab_size=4096, max_position_embeddings=512,
        sliding_window=window, attn_implementation="eager", pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    assert config.attn_logit_softcapping
    assert config.final_logit_softcapping
    model = hf.Gemma2ForCausalLM(config)
    with torch.no_grad():
        for place, (name, parameter) in enumerate(sorted(model.named_parameters())):
            # A uniform number between -2 and 2 has a variance of 4/3.
            scale = 0.25 if name.endswith("norm.weight") else 0.87 / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn(seed + place, *parameter.shape) * scale)
        model.model.norm.weight.add_(3)  # predictions that are not all alike
    return model.eval().requires_grad_(False)


def make(
    folder: Path, *, layers: int = 4, d: int = 32, heads: int = 4, window: int = 4,
    features: int = 24, l0: float = 2.0, skip: bool = False, seed: int = 0, text: str = PROMPT,
) -> Path:  # fmt: skip
    """The model at `folder/model`, the transcoders at `folder/layer_N`; `l0` is met on `text`."""
    model = model_of(layers, d, heads, window, 1_000 * seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(miniature.MODEL)
    model.save_pretrained(folder / "model")
    # As they are: what transformers 5 writes, 4 does not read.
    for file in miniature.MODEL.glob("tokenizer*.json"):
        shutil.copy(file, folder / "model")
    x, y = _seen(model, torch.tensor([[2, *tokenizer(text, add_special_tokens=False).input_ids]]))
    for layer in range(layers):
        at = 1_000 * seed + 500 + 5 * layer
        w_enc = drawn(at, d, features) * 0.87 / d**0.5
        pre = x[layer] @ w_enc
        height = pre.flatten().sort(descending=True).values[round(l0 * len(pre))].item()
        w_dec = drawn(at + 1, features, d) * 0.5 * y[layer].std() / (l0**0.5 * pre.std())
        part = formats.Part(
            w_enc=w_enc, b_enc=drawn(at + 2, features) / 16, w_dec=w_dec.half().float(),
            b_dec=drawn(at + 3, d) * 0.25, threshold=torch.full((features,), round(height, 2)),
            skip=drawn(at + 4, d, d) * 0.25 / d**0.5 if skip else None,
        )  # fmt: skip
        config = formats.Config(
            hf_hook_point_in=f"model.layers.{layer}.pre_feedforward_layernorm.output",
            hf_hook_point_out=f"model.layers.{layer}.post_feedforward_layernorm.output",
            width=features, model_name=folder.name, architecture="jump_relu", l0=l0,
            affine_connection=skip, type="transcoder",
        )  # fmt: skip
        formats.write_gemma_scope_2(folder / f"layer_{layer}", config, [part])
    return folder


def _seen(model: hf.Gemma2ForCausalLM, ids: torch.Tensor) -> tuple[list, list]:
    """What MLPs read and write on all tokens but the first, by layer."""
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for block in model.model.layers:
        for norm, kept in ((block.pre_feedforward_layernorm, read),
                           (block.post_feedforward_layernorm, written)):  # fmt: skip
            norm.register_forward_hook(lambda _m, _i, out, k=kept: k.append(out[0, 1:]))
    model(input_ids=ids)
    return read, written
