"""What attention carries: which heads an edge goes through, and where a feature's input comes from.

Patterns are held, so that what a head moves is linear in what its tokens hold: shares are exact and
sum to what they are shares of.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.hub import feature_of, load_sae
from gemscope.lm import LanguageModel
from gemscope.sites import Site, Stream
from gemscope.steering import Prompt, feature

from ._frozen import Frozen, Start
from ._graph import Graph
from ._replay import Probe, Replay, Write
from ._transcoders import Load


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Carried:
    """How an edge passes one layer's attention; heads, bypass and later sum to its weight."""

    layer: int
    heads: tuple[float, ...]
    """The part through each head."""
    bypass: float
    """The part that stays at its positions, in the residual stream."""
    later: float
    """The part that is written after this attention: of cross-layer transcoders alone."""
    skip: float | None
    """Of all of it, what then goes through the skip connection of this layer's transcoder; None
    without one."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EdgePath:
    """An edge, layer by layer."""

    source: str
    target: str
    weight: float
    layers: tuple[Carried, ...]
    """From the first attention after the source to the last before the target."""

    def json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {
            "source": self.source, "target": self.target, "weight": self.weight,
            "layers": [
                {"layer": one.layer, "heads": list(one.heads), "bypass": one.bypass,
                 "later": one.later, "skip": one.skip}
                for one in self.layers
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Direct:
    """What each head adds to a feature of attention from each token."""

    name: str
    prompt: Prompt
    layer: int
    position: int
    parts: Float[Tensor, "heads positions"]
    """Up to the feature's position; float64."""
    value: float
    """The feature's pre-activation."""
    bias: float
    """What of it comes from no token: the encoder's bias, and the output projection's if the
    feature reads what that gives."""

    def json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {
            "feature": self.name, "layer": self.layer, "position": self.position,
            "tokens": [self.prompt.shown(p) for p in range(len(self.prompt))],
            "pre_activation": self.value, "bias": self.bias, "parts": self.parts.tolist(),
        }  # fmt: skip


@torch.no_grad()
def explain_edge(
    graph: Graph, model: LanguageModel, source: str, target: str, *, load: Load = load_sae
) -> EdgePath:
    """Which heads carry what `source` adds to `target`, both ids of nodes of `graph`.

    The edge need not be shown: its weight is computed anew.

    Raises:
        InputError: No such nodes, a source that is a target or a bias, another model than the
            graph's, or a source from which nothing leads to the target.
    """
    ends = [graph.nodes[graph.place(one)] for one in (source, target)]
    replay = Replay.of(graph, model, load)
    layers, weight = head_shares(replay.frozen, replay.writes(ends[0]), replay.probe(ends[1]))
    if not layers and not weight:
        raise InputError(f"nothing leads from {source} to {target}: it is written later, or after")
    return EdgePath(source=source, target=target, weight=weight, layers=tuple(layers))


def head_shares(
    frozen: Frozen, writes: Sequence[Write], probe: Probe
) -> tuple[list[Carried], float]:
    """How what is written reaches what is read, by layer, and what it adds in all."""
    start = _start(frozen, probe)
    stop = start.stop
    streams = _streams(frozen, writes, start.site.layer, stop)
    back = {step.site: step.gradient[:, 0] for step in frozen.back(start, heads=True)}
    reached = [
        (write.site, float(write.vector.to(frozen.final) @ back[write.site][write.position]))
        for write in writes
        if write.site in back and write.position < stop
    ]
    carried = []
    for layer in range(start.site.layer + 1):
        own = frozen.layers[layer]
        inside = back.get(Site(layer, Stream.ATTN_HEADS))
        x = streams.get(Site(layer, Stream.RESID_PRE))
        if inside is None or x is None:
            continue
        moved = frozen.in_heads(layer, x[:, None])[:stop, 0]
        heads = (moved * inside.view(moved.shape)).sum((0, 2))
        # What attention alone is read for passes beside it to nothing.
        alone = start.site in (Site(layer, Stream.ATTN_HEADS), Site(layer, Stream.ATTN_OUT))
        mid = back.get(Site(layer, Stream.ATTN_OUT))
        beside = 0.0 if alone or mid is None else float((x[:stop] * mid).sum())
        after = back.get(Site(layer, Stream.MLP_OUT))
        skip = None
        if own.skip is not None and after is not None:
            held = (streams[Site(layer, Stream.RESID_MID)] * frozen.counted[:, None])[:stop]
            skip = float((((held * own.mlp[:stop, 0]) @ own.skip) * after).sum())
        later = sum((part for site, part in reached
                     if site.stream is Stream.MLP_OUT and site.layer >= layer), 0.0)  # fmt: skip
        carried.append(
            Carried(layer=layer, heads=tuple(heads.tolist()), bypass=beside, later=later, skip=skip)
        )
    return carried, sum((part for _, part in reached), 0.0)


def _start(frozen: Frozen, probe: Probe) -> Start:
    at = torch.tensor([probe.position], device=frozen.final.device)
    vector = probe.vector.to(frozen.final)[None]
    return frozen.logits(vector, at) if probe.final else Start(probe.site, at, vector)


def _streams(
    frozen: Frozen, writes: Iterable[Write], last: int, stop: int
) -> dict[Site, Float[Tensor, "seq d_model"]]:
    """The part of each stream that comes from what is written."""
    out: dict[Site, Tensor] = {}
    for write in writes:
        layer = -1 if write.site.stream is Stream.EMBED else write.site.layer
        at = torch.tensor([write.position], device=frozen.final.device)
        for step in frozen.ahead(layer, at, write.vector.to(frozen.final)[None]):
            if step.site.layer > last:
                break
            x = step.gradient[:, 0]
            out[step.site] = out[step.site] + x if step.site in out else x
    return out


@torch.no_grad()
def direct_attribution(
    model: LanguageModel, prompt: str, name: str, *, position: int = -1, chat: bool = False,
    load: Load = load_sae,
) -> Direct:  # fmt: skip
    """What each head adds to a feature of attention from each token of `prompt`.

    `name` is `ADDRESS/INDEX` of a dictionary that reads `attn_heads` or `attn_out`; `position` that
    of the feature, from the end if negative. Parts and bias sum to the pre-activation, whether the
    feature fires or not. (Kissane et al., "Interpreting Attention Layer Outputs with Sparse
    Autoencoders", 2024.)

    Raises:
        InputError: A dictionary of another stream or model, no such feature or position, a family
            whose patterns cannot be read.
    """
    address, index = feature_of(name)
    dictionary = load(address)
    model.check(dictionary)
    found = feature(dictionary, index, name=name).to(model.device)
    site = found.reads
    if site.stream not in (Stream.ATTN_HEADS, Stream.ATTN_OUT):
        raise InputError(
            f"{address} reads {site}, which is not what attention gives; give a feature of a "
            "dictionary at attn_heads or attn_out"
        )
    said = Prompt(prompt, model.prompts(prompt, chat=chat), model.tokenizer)
    place = said.check(position, "position")
    # Where a family fuses what is needed, this run says so.
    run = model.run(said.batch, read=[*Frozen.needs(model), site], attention=True)
    frozen = Frozen.of(model, run, {})
    own, start = frozen.layers[site.layer], _start(frozen, Probe(site, place, found.column))
    inside = next(
        step.gradient[place, 0] for step in frozen.back(start, heads=True)
        if step.site.stream is Stream.ATTN_HEADS
    )  # fmt: skip
    kv, group = own.pattern.shape[:2]
    read = inside.view(kv, group, -1).double()
    values = ((run[Site(site.layer, Stream.RESID_PRE)][0].to(own.value) * own.before[:, 0])
              @ own.value).double()  # fmt: skip
    values = values if own.value_bias is None else values + own.value_bias.double()
    each = torch.einsum("agd,kad->agk", read, values.view(len(values), kv, -1))
    parts = (each * own.pattern[:, :, place].double()).flatten(0, 1)[:, : place + 1].cpu()
    bias = float(found.bias)
    if site.stream is Stream.ATTN_OUT and own.output_bias is not None:
        after = 1.0 if own.after is None else own.after[place, 0]
        bias += float(own.output_bias * after @ start.vectors[0])
    x = run[site][0, place].double()
    return Direct(
        name=name, prompt=said, layer=site.layer, position=place, parts=parts, bias=bias,
        value=float(x @ found.column.double()) + float(found.bias),
    )  # fmt: skip
