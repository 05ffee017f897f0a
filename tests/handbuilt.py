"""Models built by hand around a circuit that is known, with transcoders that are exact."""

import torch
import transformers as hf

from gemscope import miniature as bundled
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, Origin, ReLU
from gemscope.sites import Site, Stream

D, INNER, CONSTANT = 32, 8, 8
"""Widths, and the dimension in which every token is 1."""
TOKENS = (" self", " the", " return", ")", " None", "def", ":", "(")
"""Each a dimension of its own, 0 to 7."""


def _blank(d_head=D):
    """A Llama of two layers that does nothing; an MLP is `down(relu(gate x + bias))`."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=D, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=d_head, vocab_size=4096, max_position_embeddings=64,
        hidden_act="relu", mlp_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    if not hasattr(config, "rope_parameters"):
        config.rope_theta = 1e8
    config.rope_theta = 1e8
    model = hf.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.zero_()
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    ids = [_id(tokenizer, token) for token in TOKENS]
    # Every other token is alike: all have the same norm, and norms divide by the same.
    model.model.embed_tokens.weight[:, CONSTANT : CONSTANT + 2] = 1.0
    for dimension, token in enumerate(ids):
        model.model.embed_tokens.weight[token, CONSTANT + 1] = 0.0
        model.model.embed_tokens.weight[token, dimension] = 1.0
    for layer in model.model.layers:
        layer.mlp.up_proj.bias.fill_(1.0)
        layer.mlp.gate_proj.bias.fill_(-1.0)  # silent, whatever is read
    return model, tokenizer, ids


def _id(tokenizer, token):
    (found,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    return found


def _exact(model):
    """Transcoders that are the MLPs themselves, by address."""
    out = {}
    for n, layer in enumerate(model.model.layers):
        mlp, address = layer.mlp, f"exact/layer_{n}"
        out[address] = SAE(
            w_enc=mlp.gate_proj.weight.T.contiguous(), b_enc=mlp.gate_proj.bias,
            w_dec=mlp.down_proj.weight.T.contiguous(), b_dec=torch.zeros(D), activation=ReLU(),
            reads=Site(n, Stream.MLP_IN), writes=Site(n, Stream.MLP_OUT),
            origin=Origin(address=address),
        )  # fmt: skip
    return out


def lookup():
    """`)` is looked up in two steps: feature 0 of layer 0 fires on it and writes dimension 16;
    feature 1 of layer 1 reads that and writes dimension 17, which ` None` is unembedded from.
    Other features fire on every token and write what nobody reads.
    """
    model, tokenizer, ids = _blank()
    first, second = (layer.mlp for layer in model.model.layers)
    first.gate_proj.weight[0, TOKENS.index(")")] = 1.0
    first.gate_proj.bias[0] = -0.5
    first.down_proj.weight[16, 0] = 2.0
    second.gate_proj.weight[1, 16] = 1.0
    second.gate_proj.bias[1] = -0.5
    second.down_proj.weight[17, 1] = 3.0
    for mlp in (first, second):
        for feature in range(2, INNER):
            mlp.gate_proj.weight[feature, CONSTANT] = 1.0
            mlp.gate_proj.bias[feature] = 0.0
            mlp.down_proj.weight[20 + feature, feature] = 0.5
    model.lm_head.weight[ids[TOKENS.index(" None")], 17] = 4.0
    return LanguageModel(model, tokenizer), _exact(model)


def induction():
    """A head of layer 0 copies the token before to dimensions 16 to 23; the head of layer 1 looks
    for what the last token is in those, and copies the token it finds there to 24 to 31.
    """
    model, tokenizer, ids = _blank()
    one, two = (layer.self_attn for layer in model.model.layers)
    half = D // 2
    # A rotation turns a query by its position: turned back by one step, it meets the key before.
    for pair in range(2):
        angle = torch.tensor(1e8 ** (-pair / half))
        one.q_proj.weight[pair, CONSTANT] = 40 * torch.cos(-angle)
        one.q_proj.weight[pair + half, CONSTANT] = 40 * torch.sin(-angle)
        one.k_proj.weight[pair, CONSTANT] = 1.0
    for token in range(len(TOKENS)):
        one.v_proj.weight[token, token] = 1.0
        one.o_proj.weight[16 + token, token] = 1.0
        # Pairs that turn too slowly for positions to matter.
        two.q_proj.weight[half - 1 - token, token] = 40.0
        two.k_proj.weight[half - 1 - token, 16 + token] = 1.0
        two.v_proj.weight[token, token] = 1.0
        two.o_proj.weight[24 + token, token] = 1.0
        model.lm_head.weight[ids[token], 24 + token] = 4.0
    return LanguageModel(model, tokenizer), _exact(model)
