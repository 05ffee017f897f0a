"""Why a head attends where it does: its score as a sum over pairs of what both tokens hold.

A score is the product of a query and a key, divided by a constant. With the denominators of norms
held, the query is a sum over all that the stream at its position is made of, and the key likewise:
so the score is a sum over pairs. It is the score before a soft-cap and before softmax, which
compares it with those of other keys. (Kamath et al., "Tracing Attention Computation Through Feature
Interactions", 2025.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel, Run, wide
from gemscope.sae import SAE
from gemscope.sites import Site, Stream
from gemscope.steering import Prompt

from ._frozen import Frozen, Start
from ._graph import Kind, Node
from ._replay import Replay
from ._sources import Sources
from ._transcoders import Load, transcoder_set

_PAIRS = 2**22
"""Pairs looked at, at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something that a stream is made of."""

    kind: Kind
    layer: int | None
    position: int | None
    feature: int | None = None
    address: str | None = None

    @property
    def label(self) -> str:
        """As it is told: `ADDRESS/INDEX @5`, `error of layer 2 @5`, `token @0`."""
        at = "" if self.position is None else f" @{self.position}"
        if self.address is not None and self.feature is not None:
            return f"{self.address}/{self.feature}{at}"
        names = {Kind.EMBEDDING: "token", Kind.BOS: f"MLP of layer {self.layer}",
                 Kind.ERROR: f"error of layer {self.layer}"}  # fmt: skip
        return f"{names.get(self.kind, f'biases of layer {self.layer}')}{at}"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Attended:
    """The score of one head between two positions."""

    prompt: Prompt
    layer: int
    head: int
    query: int
    key: int
    score: float
    """Before a soft-cap and before softmax; what all pairs sum to."""
    summed: float
    pattern: float
    """What softmax made of it: the share of the query's attention that the key gets."""
    parts: tuple[Part, ...]
    queries: Float[Tensor, " n_parts"]
    """What each part adds on the query's side, over all keys' parts. float64."""
    keys: Float[Tensor, " n_parts"]
    """What each adds on the key's side, over all queries' parts."""
    pairs: tuple[tuple[int, int, float], ...]
    """The pairs that add most by size: part of the query, part of the key, what they add."""

    def json(self) -> dict[str, Any]:
        """The same as one JSON object; `rest` is what the pairs not given sum to."""
        labels = [part.label for part in self.parts]
        return {
            "layer": self.layer, "head": self.head, "query": self.query, "key": self.key,
            "query_token": self.prompt.shown(self.query), "key_token": self.prompt.shown(self.key),
            "score": self.score, "sum": self.summed, "pattern": self.pattern,
            "rest": self.summed - sum(value for *_, value in self.pairs),
            "pairs": [{"query": labels[q], "key": labels[k], "value": v} for q, k, v in self.pairs],
            "queries": _largest(labels, self.queries), "keys": _largest(labels, self.keys),
        }  # fmt: skip


def _largest(labels: Sequence[str], values: Tensor) -> list[dict[str, Any]]:
    order = values.abs().argsort(descending=True)[:20].tolist()
    return [{"part": labels[i], "value": values[i].item()} for i in order]


@torch.no_grad()
def attribute_attention(
    model: LanguageModel, prompt: str, layer: int, head: int, *, query: int, key: int,
    dictionaries: Sequence[str], top: int = 50, chat: bool = False, load: Load = load_sae,
) -> Attended:  # fmt: skip
    """A head's score from the position `query` to `key`, by pairs of what both are made of.

    `dictionaries` are transcoders, as for a graph: then the parts are features, errors, tokens and
    constants of all earlier layers and positions, with what heads have moved of them. Or one
    dictionary of the stream before the layer (its `resid_pre`, or `resid_post` of the layer
    before): then they are the features active at the two positions themselves, the rest of the
    stream there, and biases. `top` pairs are given.

    Raises:
        InputError: No such layer, head or position, a key after its query or outside its window, a
            dictionary of another stream or model, a family that fuses queries and keys.
    """
    n_heads = model.config.num_attention_heads
    if not 0 <= layer < model.n_layers or not 0 <= head < n_heads:
        raise InputError(
            f"there is no head {layer}/{head}: layers are 0 to {model.n_layers - 1}, heads 0 to "
            f"{n_heads - 1}"
        )
    if top < 1:
        raise InputError(f"{top} pairs are asked for; give at least 1")
    said = Prompt(prompt, model.prompts(prompt, chat=chat), model.tokenizer)
    at = (said.check(query, "query"), said.check(key, "key"))
    if at[1] > at[0]:
        raise InputError(
            f"the key at {at[1]} comes after the query at {at[0]}, which cannot attend to it; give "
            "an earlier one"
        )
    seen = _Seen(model, said, layer, head)
    pattern = float(seen.run.patterns[layer][0, head, at[0], at[1]])
    if pattern == 0.0:
        raise InputError(
            f"head {layer}/{head} sees nothing at {at[1]} from {at[0]}: it lies outside the window "
            "of this layer"
        )
    maps = [seen.map(side, position) for side, position in zip("qk", at, strict=True)]
    if len(dictionaries) == 1 and isinstance(one := _single(dictionaries[0], load), SAE):
        parts, sides = _of_stream(seen, one, maps, at)
    else:
        parts, sides = _of_sources(seen, maps, at, transcoder_set(dictionaries), load)
    left, right = (side.double() for side in sides)
    whole = [seen.rotated(side, position) for side, position in zip("qk", at, strict=True)]
    scale = seen.scale
    return Attended(
        prompt=said, layer=layer, head=head, query=at[0], key=at[1], parts=tuple(parts),
        score=float(whole[0].double() @ whole[1].double()) * scale, pattern=pattern,
        summed=float(left.sum(0) @ right.sum(0)) * scale,
        queries=(left @ right.sum(0) * scale).cpu(), keys=(right @ left.sum(0) * scale).cpu(),
        pairs=_best(left * scale, right, top),
    )  # fmt: skip


def _single(name: str, load: Load) -> SAE | None:
    """A dictionary of a stream; None for what stands for MLPs, or is several."""
    if transcoder_set([name]) != [name]:
        return None
    found = load(name)
    return found if isinstance(found, SAE) and not found.is_transcoder else None


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """A query or key as a linear map of the stream at a position, and what it adds by itself."""

    matrix: Float[Tensor, "d_model d_head"]
    bias: Float[Tensor, " d_head"] | None


class _Seen:
    """A run of a prompt, and what its attention of one layer made of it."""

    def __init__(self, model: LanguageModel, prompt: Prompt, layer: int, head: int):
        self.model, self.prompt, self.layer, self.head = model, prompt, layer, head
        family = model.family
        if family.attn is None or family.attn_norm is None:
            raise InputError(
                f"models of the {family.name} family keep queries, keys and values in one matrix, "
                "which is not taken apart here; Gemma, Llama and Qwen models can be read"
            )
        path = family.attn.format(layer=layer)
        self._module = model.stack.get_submodule(path)
        self._path, self._gain = path, model.weights.gain(family.attn_norm, layer)
        self._got: dict[str, Tensor] = {}
        handles = [self._module.register_forward_pre_hook(self._turns, with_kwargs=True)]
        for name in ("q_proj", "k_proj"):
            module = self._module.get_submodule(name)
            handles.append(module.register_forward_hook(
                lambda _m, _args, out, name=name: self._got.__setitem__(name, out)
            ))  # fmt: skip
        try:
            self.run: Run = model.run(prompt.batch, read=Frozen.needs(model), attention=True)
        finally:
            for handle in handles:
                handle.remove()

    def _turns(self, _module: Any, args: tuple, kwargs: dict) -> None:
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        self._got["cos"], self._got["sin"] = cos[0], sin[0]

    @property
    def scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        scaling: Any = self._module.scaling
        return float(scaling)

    def _head(self, side: str) -> int:
        """The head's number on a side: keys are shared."""
        config = self.model.config
        return self.head if side == "q" else (
            self.head * config.num_key_value_heads // config.num_attention_heads
        )  # fmt: skip

    def rotated(self, side: str, position: int) -> Float[Tensor, " d_head"]:
        """The query or key as the model made it."""
        return self._turned(wide(self._made(side, position))[None], position)[0]

    def map(self, side: str, position: int) -> _Map:
        """The query or key as a map of the stream, denominators held."""
        proj = self._module.get_submodule(f"{side}_proj")
        head, width = self._head(side), len(self._raw(side, position))
        span = slice(head * width, (head + 1) * width)
        x = wide(self.run[Site(self.layer, Stream.RESID_PRE)][0, position])
        eps = self.model.weights.block(self.layer).eps[0]
        inverse = torch.rsqrt(x.square().mean() + eps)
        matrix = wide(proj.get_parameter("weight"))[span].T * (self._gain * inverse)[:, None]
        bias = getattr(proj, "bias", None)
        bias = None if bias is None else wide(bias[span])
        scale = self._normed(side, position)
        matrix = self._turned(matrix * scale, position)
        if bias is not None:
            bias = self._turned((bias * scale)[None], position)[0]
        return _Map(matrix, bias)

    def _raw(self, side: str, position: int) -> Float[Tensor, " d_head"]:
        config = self.model.config
        n = config.num_attention_heads if side == "q" else config.num_key_value_heads
        return self._got[f"{side}_proj"][0, position].unflatten(0, (n, -1))[self._head(side)]

    def _made(self, side: str, position: int) -> Float[Tensor, " d_head"]:
        """The query or key before it is rotated, normed where the family norms it."""
        raw, norm = self._raw(side, position), getattr(self._module, f"{side}_norm", None)
        return raw if norm is None else norm(raw)

    def _normed(self, side: str, position: int) -> Tensor | float:
        """What the norm of queries or keys multiplies each number by, its denominator held."""
        if not hasattr(self._module, f"{side}_norm"):
            return 1.0
        gain = self.model.weights.gain(f"{self._path}.{side}_norm", self.layer)
        raw = wide(self._raw(side, position))
        # One number of it says the denominator of all: the largest, which rounds least.
        weighted = raw * gain
        most = int(weighted.abs().argmax())
        return gain * wide(self._made(side, position))[most] / weighted[most]

    def _turned(self, x: Float[Tensor, "n d_head"], position: int) -> Float[Tensor, "n d_head"]:
        """Rotated by the position, as all these families rotate: halves against each other."""
        cos, sin = (self._got[name][position].to(x) for name in ("cos", "sin"))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def _of_stream(
    seen: _Seen, sae: SAE, maps: Sequence[_Map], at: tuple[int, int]
) -> tuple[list[Part], list[Tensor]]:
    """Parts of the streams at the two positions, by a dictionary of that stream."""
    layer, model = seen.layer, seen.model
    model.check(sae)
    near = {Site(layer, Stream.RESID_PRE), Site(layer - 1, Stream.RESID_POST)}
    if sae.reads not in near:
        wanted = " or ".join(str(site) for site in sorted(near) if site.layer >= 0)
        raise InputError(
            f"{sae.origin.address or 'the dictionary'} reads {sae.reads}, and not the stream "
            f"before layer {layer}; give one of {wanted}, or transcoders"
        )
    parts: list[Part] = []
    sides: list[list[Tensor]] = [[], []]

    def add(part: Part, side: int, vector: Tensor) -> None:
        parts.append(part)
        sides[side].append(vector)
        sides[1 - side].append(torch.zeros_like(vector))

    for side, (one, position) in enumerate(zip(maps, at, strict=True)):
        x = wide(seen.run[Site(layer, Stream.RESID_PRE)][0, position])
        code = sae.to(model.device).encode(x[None])
        rows = code.values[:, None].to(x) * sae.rows(code.indices.tolist())[:, 0].to(x)
        rest = x - rows.sum(0) - sae.b_dec.to(x)
        for index, row in zip(code.indices.tolist(), rows, strict=True):
            found = Part(kind=Kind.FEATURE, layer=layer, position=position, feature=index,
                         address=sae.origin.address or "dictionary")  # fmt: skip
            add(found, side, row @ one.matrix)
        add(Part(kind=Kind.ERROR, layer=layer, position=position), side, rest @ one.matrix)
        bias = sae.b_dec.to(x) @ one.matrix
        bias = bias if one.bias is None else bias + one.bias
        add(Part(kind=Kind.BIAS, layer=layer, position=position), side, bias)
    return parts, [torch.stack(some) for some in sides]


def _of_sources(
    seen: _Seen, maps: Sequence[_Map], at: tuple[int, int], addresses: Sequence[str], load: Load
) -> tuple[list[Part], list[Tensor]]:
    """Parts of the two streams, as a graph has them."""
    replay = Replay.of_prompt(seen.model, seen.prompt, addresses, load)
    frozen, layer = replay.frozen, seen.layer
    sources = Sources(frozen, replay.transcoders, replay.active, replay.run)
    sides = []
    for one, position in zip(maps, at, strict=True):
        vectors = one.matrix.T.contiguous().to(frozen.final)
        positions = torch.full((len(vectors),), position, device=vectors.device)
        start = Start(Site(layer, Stream.RESID_PRE), positions, vectors)
        side = sources.weights(frozen.back(start), len(vectors)).T
        if one.bias is not None:
            side[sources.bias(layer)] += one.bias
        sides.append(side)
    there = (sides[0].abs().sum(1) + sides[1].abs().sum(1)) > 0
    names = replay.transcoders.addresses
    nodes = zip(sources.nodes(), there.tolist(), strict=True)
    parts = [_part(node, names) for node, kept in nodes if kept]
    return parts, [side[there] for side in sides]


def _part(node: Node, addresses: Sequence[str]) -> Part:
    address = addresses[node.layer or 0] if node.kind is Kind.FEATURE else None
    return Part(kind=node.kind, layer=node.layer, position=node.position, feature=node.feature,
                address=address)  # fmt: skip


def _best(
    left: Float[Tensor, "n d"], right: Float[Tensor, "m d"], top: int
) -> tuple[tuple[int, int, float], ...]:
    """The largest products of a row of each by size, largest first."""
    step = max(1, _PAIRS // max(1, len(right)))
    found: list[tuple[int, int, float]] = []
    for first in range(0, len(left), step):
        products = left[first : first + step] @ right.T
        flat = products.abs().flatten().topk(min(top, products.numel())).indices.tolist()
        found += [
            (first + i // len(right), i % len(right), products.flatten()[i].item()) for i in flat
        ]
    found.sort(key=lambda one: (-abs(one[2]), one[:2]))
    return tuple(one for one in found[:top] if one[2])
