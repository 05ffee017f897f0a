"""Tiny random models of several families, and random transcoders for each of their MLPs."""

import torch
import transformers as hf

from gemscope import miniature as bundled
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, CrossLayer, JumpReLU, Layer, Origin
from gemscope.sites import Site, Sites, Stream

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 96,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# Windows shorter than the prompt, and heads that are wider together than the model.
WINDOWS = {"head_dim": 12, "sliding_window": 6}
MODELS = {
    "gemma-2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, **WINDOWS, attn_logit_softcapping=1.0)
    ),
    "gemma-3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SIZES, **WINDOWS,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama with biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
}  # fmt: skip
PROMPT = "def area(width, height):\n    return width"


def random_model(name, dtype=torch.float32):
    """A model of the family, its parameters away from where they are first put."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    return LanguageModel(model.to(dtype).eval().requires_grad_(False), tokenizer)


def _numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) / shape[0] ** 0.5


def transcoders(model, *, d_sae=24, skip=False, stream=Stream.MLP_IN, threshold=0.3):
    """A random transcoder for each MLP, by address."""
    d, out = model.config.hidden_size, {}
    for layer in range(model.n_layers):
        new, address = _numbers(layer), f"random/layer_{layer}"
        out[address] = SAE(
            w_enc=new(d, d_sae), b_enc=0.1 * new(d_sae), w_dec=new(d_sae, d), b_dec=new(d),
            activation=JumpReLU(torch.full((d_sae,), threshold)), reads=Site(layer, stream),
            writes=Site(layer, Stream.MLP_OUT), skip=0.3 * new(d, d) if skip else None,
            origin=Origin(address=address),
        )  # fmt: skip
    return out


def cross_layer(model, *, per_layer=20, skip=True):
    """A random cross-layer transcoder, by its address."""
    d, n = model.config.hidden_size, model.n_layers
    layers = []
    for layer in range(n):
        new = _numbers(10 + layer)
        w_dec = new(per_layer, n, d)
        w_dec[:, :layer] = 0
        layers.append(
            Layer(
                w_enc=new(d, per_layer),
                b_enc=0.1 * new(per_layer),
                threshold=torch.full((per_layer,), 0.3),
                w_dec=w_dec,
                b_dec=new(d),
                skip=0.3 * new(d, d) if skip else None,
            )
        )
    sites = [Sites(Site(i, s) for i in range(n)) for s in (Stream.MLP_IN, Stream.MLP_OUT)]
    address = "random/clt"
    return {
        address: CrossLayer(
            layers=tuple(layers), reads=sites[0], writes=sites[1], origin=Origin(address=address)
        )
    }
