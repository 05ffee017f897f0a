"""Where each model family keeps each site: rows of data.

A new family is a new row. Paths are those of the `transformers` modules below the decoder stack.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

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
    """Whether the module is an RMSNorm whose gain is to be left out."""

    def path(self, layer: int) -> str:
        """Path of the module in `layer`."""
        return self.module.format(layer=layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family of models is built, as far as reading and writing it goes."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` values of `transformers`."""
    stacks: tuple[str, ...]
    """Where the decoder stack may lie in the model, most specific first."""
    taps: dict[Stream, Tap]
    final_norm: str
    attn_projection: str
    """The linear map from `attn_heads` to the residual stream's width."""
    attn_post_norm: str | None
    """The norm that follows it, if any."""
    gain_offset: float
    """The gain of an RMSNorm is this plus its weight: Gemma stores the gain less one."""
    float16: bool
    """Whether activations fit into float16."""

    def tap(self, site: Site) -> Tap:
        """The tensor of `site`."""
        return self.taps[site.stream]

    def hook(self, site: Site) -> str:
        """`site` in Gemma Scope 2's words, such as `model.layers.3.output`."""
        tap = self.tap(site)
        if tap.gain_free:
            raise InputError(f"{site} has no name in Gemma Scope 2's layout; mlp_in has")
        return f"model.{tap.path(site.layer)}.{tap.side}"

    def site_of_hook(self, hook: str) -> Site:
        """The site that Gemma Scope 2's files call `hook`."""
        for stream, tap in self.taps.items():
            if tap.gain_free:
                continue
            pattern = re.escape(f"model.{tap.module}.{tap.side}").replace(
                re.escape("{layer}"), r"(\d{1,4})"
            )
            if match := re.fullmatch(pattern, hook):
                return Site(int(match[1]) if match.groups() else 0, stream)
        known = ", ".join(self.hook(Site(0, s)) for s, t in self.taps.items() if not t.gain_free)
        raise InputError(f"no site is called {hook!r}; in layer 0 the names are {known}")


_LAYER = "layers.{layer}"
_GEMMA_BLOCK = {
    Stream.RESID_PRE: Tap(_LAYER, Side.INPUT),
    Stream.RESID_MID: Tap(f"{_LAYER}.pre_feedforward_layernorm", Side.INPUT),
    Stream.RESID_POST: Tap(_LAYER, Side.OUTPUT),
    Stream.ATTN_HEADS: Tap(f"{_LAYER}.self_attn.o_proj", Side.INPUT),
    Stream.ATTN_OUT: Tap(f"{_LAYER}.post_attention_layernorm", Side.OUTPUT),
    Stream.MLP_IN: Tap(f"{_LAYER}.pre_feedforward_layernorm", Side.OUTPUT),
    Stream.MLP_IN_UNSCALED: Tap(f"{_LAYER}.pre_feedforward_layernorm", Side.OUTPUT, gain_free=True),
    Stream.MLP_HIDDEN: Tap(f"{_LAYER}.mlp.down_proj", Side.INPUT),
    Stream.MLP_OUT: Tap(f"{_LAYER}.post_feedforward_layernorm", Side.OUTPUT),
    Stream.EMBED: Tap("embed_tokens", Side.OUTPUT),
}

FAMILIES = (
    Family(
        name="gemma-3",
        model_types=("gemma3_text",),
        stacks=("model",),
        taps=_GEMMA_BLOCK,
        final_norm="norm",
        attn_projection=f"{_LAYER}.self_attn.o_proj",
        attn_post_norm=f"{_LAYER}.post_attention_layernorm",
        gain_offset=1.0,
        float16=False,
    ),
)


def family_of(model_type: str) -> Family:
    """The family whose `transformers` configuration says `model_type`."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES for t in f.model_types)
    raise InputError(f"no sites are known for model type {model_type!r}; known: {known}")
