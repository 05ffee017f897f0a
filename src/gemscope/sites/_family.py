"""Where each model family keeps each site: rows of data.

A new family is a new row. Paths are those of the `transformers` modules below the decoder stack.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gemscope.errors import InputError

from ._site import Site, Stream


class Side(StrEnum):
    """Which end of a module a tensor is taken from."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor of the forward pass: one end of one module."""

    module: str
    """Path below the decoder stack, `{layer}` standing for the layer."""
    side: Side
    gain_free: bool = False
    """Whether the module is a norm whose gain, and bias if it has one, are to be left out."""

    def path(self, layer: int) -> str:
        """Path of the module in `layer`."""
        return self.module.format(layer=layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family of models is built, as far as reading and writing it goes."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` values of `transformers`, of the text model."""
    names: str
    """What the names of its models look like: a regular expression, searched without case."""
    stacks: tuple[str, ...]
    """Where the decoder stack may lie in the model, most specific first."""
    taps: dict[Stream, Tap]
    final_norm: str
    attn_projection: str
    """The linear map from `attn_heads` to the residual stream's width."""
    attn_post_norm: str | None = None
    """The norm that follows it, if any."""
    attn: str | None = None
    """The attention's module. None, with the three below, where keys and values share a matrix."""
    attn_norm: str | None = None
    """The norm before attention."""
    attn_value: str | None = None
    """The linear map from it to the values of each head."""
    mlp_norm: str | None = None
    """The norm before the MLP."""
    gain_offset: float = 0.0
    """The gain of a norm is this plus its weight: Gemma stores the gain less one."""
    centred: bool = False
    """Whether norms are LayerNorms, which take the mean out and add a bias."""
    transposed: bool = False
    """Whether projections store `[in, out]`, as GPT-2's do, and not `[out, in]`."""
    float16: bool = True
    """Whether activations fit into float16."""
    user_prefix: str | None = None
    """What begins a user's turn in the chats of its instruction-tuned models, where activations
    are outliers that no dictionary was trained on."""
    every_turn: bool = False
    """Whether that holds for every turn, or for the first one of a context only."""

    def tap(self, site: Site) -> Tap:
        """The tensor of `site`."""
        if site.stream not in self.taps:
            raise InputError(
                f"models of the {self.name} family have no {site.stream}; "
                f"they have {', '.join(self.taps)}"
            )
        return self.taps[site.stream]

    def hook(self, site: Site) -> str:
        """`site` in the words of Gemma Scope 2's files, such as `model.layers.3.output`."""
        tap = self.tap(site)
        if tap.gain_free:
            raise InputError(f"{site} has no name in Gemma Scope 2's layout; mlp_in has")
        return f"model.{tap.path(site.layer)}.{tap.side}"

    def site_of_hook(self, hook: str) -> Site | None:
        """The site that `hook` names, if it is one of this family's."""
        for stream, tap in self.taps.items():
            if tap.gain_free:
                continue
            pattern = re.escape(f"model.{tap.module}.{tap.side}").replace(
                re.escape("{layer}"), r"(\d{1,4})"
            )
            if match := re.fullmatch(pattern, hook):
                return Site(int(match[1]) if match.groups() else 0, stream)
        return None


_LAYER = "layers.{layer}"


def _sandwich() -> dict[Stream, Tap]:
    """A block with a norm before and after both attention and MLP."""
    return {
        Stream.RESID_PRE: Tap(_LAYER, Side.INPUT),
        Stream.RESID_MID: Tap(f"{_LAYER}.pre_feedforward_layernorm", Side.INPUT),
        Stream.RESID_POST: Tap(_LAYER, Side.OUTPUT),
        Stream.ATTN_HEADS: Tap(f"{_LAYER}.self_attn.o_proj", Side.INPUT),
        Stream.ATTN_OUT: Tap(f"{_LAYER}.post_attention_layernorm", Side.OUTPUT),
        Stream.MLP_IN: Tap(f"{_LAYER}.pre_feedforward_layernorm", Side.OUTPUT),
        Stream.MLP_IN_UNSCALED: Tap(
            f"{_LAYER}.pre_feedforward_layernorm", Side.OUTPUT, gain_free=True
        ),
        Stream.MLP_HIDDEN: Tap(f"{_LAYER}.mlp.down_proj", Side.INPUT),
        Stream.MLP_OUT: Tap(f"{_LAYER}.post_feedforward_layernorm", Side.OUTPUT),
        # Older versions of the library scale after the embedding's module.
        Stream.EMBED: Tap("layers.0", Side.INPUT),
    }


def _pre_norm(layer: str, norm: str, attention: str, down: str) -> dict[Stream, Tap]:
    """A block with a norm before attention and one before the MLP."""
    return {
        Stream.RESID_PRE: Tap(layer, Side.INPUT),
        Stream.RESID_MID: Tap(f"{layer}.{norm}", Side.INPUT),
        Stream.RESID_POST: Tap(layer, Side.OUTPUT),
        Stream.ATTN_HEADS: Tap(f"{layer}.{attention}", Side.INPUT),
        Stream.ATTN_OUT: Tap(f"{layer}.{attention}", Side.OUTPUT),
        Stream.MLP_IN: Tap(f"{layer}.{norm}", Side.OUTPUT),
        Stream.MLP_IN_UNSCALED: Tap(f"{layer}.{norm}", Side.OUTPUT, gain_free=True),
        Stream.MLP_HIDDEN: Tap(f"{layer}.mlp.{down}", Side.INPUT),
        Stream.MLP_OUT: Tap(f"{layer}.mlp", Side.OUTPUT),
    }


_LLAMA_BLOCK = _pre_norm(_LAYER, "post_attention_layernorm", "self_attn.o_proj", "down_proj")


def _attention(mlp_norm: str) -> dict[str, Any]:
    """Where the parts of attention lie that have a matrix each for queries, keys and values."""
    return {
        "attn": f"{_LAYER}.self_attn",
        "attn_norm": f"{_LAYER}.input_layernorm",
        "attn_value": f"{_LAYER}.self_attn.v_proj",
        "attn_projection": f"{_LAYER}.self_attn.o_proj",
        "mlp_norm": f"{_LAYER}.{mlp_norm}",
    }


_NEOX_BLOCK = _pre_norm(_LAYER, "post_attention_layernorm", "attention.dense", "dense_4h_to_h")
# Attention and MLP read the same stream side by side: nothing lies between them.
del _NEOX_BLOCK[Stream.RESID_MID]

FAMILIES = (
    Family(
        name="gemma-3",
        model_types=("gemma3_text",),
        names=r"gemma-?3|gemscope/miniature",
        stacks=("model.language_model", "language_model.model", "model"),
        taps=_sandwich(),
        final_norm="norm",
        **_attention("pre_feedforward_layernorm"),
        attn_post_norm=f"{_LAYER}.post_attention_layernorm",
        gain_offset=1.0,
        float16=False,
        user_prefix="<start_of_turn>user\n",
    ),
    Family(
        name="gemma-2",
        model_types=("gemma2",),
        names="gemma-?2-",
        stacks=("model",),
        taps=_sandwich(),
        final_norm="norm",
        **_attention("pre_feedforward_layernorm"),
        attn_post_norm=f"{_LAYER}.post_attention_layernorm",
        gain_offset=1.0,
        user_prefix="<start_of_turn>user\n",
        every_turn=True,
    ),
    Family(
        name="gemma",
        model_types=("gemma",),
        names="gemma",
        stacks=("model",),
        taps=_LLAMA_BLOCK | {Stream.EMBED: Tap("layers.0", Side.INPUT)},
        final_norm="norm",
        **_attention("post_attention_layernorm"),
        gain_offset=1.0,
    ),
    Family(
        name="llama",
        model_types=("llama",),
        names="llama",
        stacks=("model",),
        taps=_LLAMA_BLOCK | {Stream.EMBED: Tap("embed_tokens", Side.OUTPUT)},
        final_norm="norm",
        **_attention("post_attention_layernorm"),
    ),
    Family(
        name="qwen",
        model_types=("qwen2", "qwen3"),
        names="qwen",
        stacks=("model",),
        taps=_LLAMA_BLOCK | {Stream.EMBED: Tap("embed_tokens", Side.OUTPUT)},
        final_norm="norm",
        **_attention("post_attention_layernorm"),
    ),
    Family(
        name="gpt-2",
        model_types=("gpt2",),
        names="gpt-?2",
        stacks=("transformer",),
        taps=_pre_norm("h.{layer}", "ln_2", "attn.c_proj", "c_proj")
        | {Stream.EMBED: Tap("wte", Side.OUTPUT)},
        final_norm="ln_f",
        attn_projection="h.{layer}.attn.c_proj",
        centred=True,
        transposed=True,
    ),
    Family(
        name="gpt-neox",
        model_types=("gpt_neox",),
        names="pythia|neox",
        stacks=("gpt_neox",),
        taps=_NEOX_BLOCK | {Stream.EMBED: Tap("embed_in", Side.OUTPUT)},
        final_norm="final_layer_norm",
        attn_projection=f"{_LAYER}.attention.dense",
        centred=True,
    ),
)


def family_of(model_type: str) -> Family:
    """The family whose `transformers` configuration says `model_type`."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES for t in f.model_types)
    raise InputError(f"no sites are known for model type {model_type!r}; known: {known}")


def family_named(model: str | None) -> Family:
    """The family that a model's name suggests; Gemma 3 where it suggests none.

    For names in files, which were made for Gemma 3 first: a loaded model's own configuration says
    what it is.
    """
    for family in FAMILIES:
        if model is not None and re.search(family.names, model, re.IGNORECASE):
            return family
    return FAMILIES[0]


def site_of_hook(hook: str, *, model: str | None = None) -> Site:
    """The site that Gemma Scope 2's files call `hook`, in the family that `model` names."""
    first = family_named(model)
    for family in (first, *FAMILIES):
        if site := family.site_of_hook(hook):
            return site
    known = ", ".join(first.hook(Site(0, s)) for s, t in first.taps.items() if not t.gain_free)
    raise InputError(f"no site is called {hook!r}; in layer 0 the names are {known}")
