"""A model of one prompt, frozen until it is linear: patterns, denominators and MLPs are constants.

What remains carries a gradient from any site back to everything that was written before it: through
the residual stream, through the values that heads move, and through the skip connections of
transcoders. It is the derivative of the plain model with attention patterns, the denominators of
norms and the outputs of MLPs held (the rules of Ameisen et al., "Circuit Tracing", 2025), as one
product of matrices a layer. Patterns hold query-key norms, soft-caps, windows and shared keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import Block, LanguageModel, Run, wide
from gemscope.sites import Site, Stream


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenLayer:
    """One layer: gains are folded into matrices, denominators are numbers by position."""

    pattern: Float[Tensor, "kv_heads group query key"]
    value: Float[Tensor, "d_model kv_width"]
    value_bias: Float[Tensor, " kv_width"] | None
    output: Float[Tensor, "heads_width d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    before: Float[Tensor, "seq 1 1"]
    """One by the denominator of the norm before attention."""
    after: Float[Tensor, "seq 1 1"] | None
    """Of the norm after it."""
    mlp: Float[Tensor, "seq 1 1"]
    """Of the norm before the MLP."""
    mlp_gain: Float[Tensor, " d_model"]
    skip: Float[Tensor, "d_model d_model"] | None
    """From the MLP's normed input, its gain folded in, to its output."""

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.value.shape[1] // self.pattern.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where gradients begin: vectors at one site, each at a position of its own."""

    site: Site
    positions: Int[Tensor, " n"]
    vectors: Float[Tensor, "n d"]

    @property
    def stop(self) -> int:
        """One more than the last position."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Gradients at one site on the way back, positions first; after the last one, all are 0."""

    site: Site
    gradient: Float[Tensor, "seq n d"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Frozen:
    """The frozen model of one prompt."""

    layers: tuple[FrozenLayer, ...]
    final: Float[Tensor, "seq 1"]
    """One by the denominator of the final norm."""
    final_gain: Float[Tensor, " d_model"]
    counted: Bool[Tensor, " seq"]
    """Positions where MLPs are replaced; elsewhere their whole output is a constant."""

    @classmethod
    def needs(cls, model: LanguageModel) -> list[Site]:
        """What a run must have read, beside its attention."""
        streams = (Stream.RESID_PRE, Stream.ATTN_HEADS, Stream.RESID_MID)
        inside = [Site(layer, s) for layer in range(model.n_layers) for s in streams]
        return [*inside, Site(model.n_layers - 1, Stream.RESID_POST)]

    @classmethod
    def of(
        cls, model: LanguageModel, run: Run, skips: dict[int, tuple[Stream, Tensor]]
    ) -> "Frozen":
        """The model as it was in the first row of `run`; `skips` are those of transcoders, by
        layer, with the stream they read.
        """
        return cls(
            layers=tuple(_layer(model, run, n, skips.get(n)) for n in range(model.n_layers)),
            final=_inverse(
                wide(run[Site(model.n_layers - 1, Stream.RESID_POST)][0]), model.weights.final()[1]
            )[:, 0],
            final_gain=model.weights.final()[0],
            counted=run.tokens.counts[0].to(model.device),
        )

    @property
    def seq(self) -> int:
        """Tokens of the prompt, BOS included."""
        return len(self.counted)

    def logits(self, directions: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Start:
        """Gradients of logits' directions (rows of the unembedding), each at its position."""
        vectors = directions * self.final_gain * self.final[positions]
        return Start(Site(len(self.layers) - 1, Stream.RESID_POST), positions, vectors)

    def back(self, start: Start, *, heads: bool = False) -> Iterator[Step]:
        """The gradients at what was written before `start`, site by site, backwards.

        At each layer's `mlp_out`, `attn_out` and, if `heads`, `attn_heads`; at last at `embed`.
        Positions after the last of `start` are left out: nothing flows from them.
        """
        layer, stream, vectors = self._normal(start)
        g = _scattered(vectors, start)
        # At one position each, gradients pass attention at a fraction of the cost.
        few = not heads and stream in (Stream.RESID_MID, Stream.ATTN_OUT)
        for at in range(layer, -1, -1) if stream is not Stream.EMBED else ():
            own = self.layers[at]
            if stream in (Stream.RESID_POST, Stream.MLP_OUT):
                yield Step(Site(at, Stream.MLP_OUT), g)
                g = self._through_skip(at, g, beside=stream is Stream.RESID_POST)
                stream = Stream.RESID_MID
            # What reads a part of the stream alone carries nothing past that part.
            beside = g if stream is Stream.RESID_MID else 0.0
            if stream is not Stream.ATTN_HEADS:
                yield Step(Site(at, Stream.ATTN_OUT), g)
            if few and at == layer and own.value_bias is None:
                g = beside + self._from_few(at, vectors, start)
            else:
                inside = g if stream is Stream.ATTN_HEADS else self._to_heads(at, g)
                if heads or own.value_bias is not None:
                    yield Step(Site(at, Stream.ATTN_HEADS), inside)
                g = beside + self._through_values(at, inside)
            stream = Stream.RESID_POST
        yield Step(Site(0, Stream.EMBED), g)

    def _normal(self, start: Start) -> tuple[int, Stream, Tensor]:
        """`start` at a site that gradients are carried from."""
        layer, stream = start.site.layer, start.site.stream
        match stream:
            case Stream.MLP_IN | Stream.MLP_IN_UNSCALED:
                own = self.layers[layer]
                scaled = start.vectors * own.mlp[start.positions, 0]
                gained = scaled * own.mlp_gain if stream is Stream.MLP_IN else scaled
                return layer, Stream.RESID_MID, gained
            case Stream.RESID_PRE:
                if layer == 0:
                    return 0, Stream.EMBED, start.vectors
                return layer - 1, Stream.RESID_POST, start.vectors
            case (
                Stream.RESID_MID | Stream.RESID_POST | Stream.MLP_OUT | Stream.ATTN_OUT
                | Stream.ATTN_HEADS | Stream.EMBED
            ):  # fmt: skip
                return layer, stream, start.vectors
        raise InputError(
            f"nothing is traced back from {start.site}; from resid_pre, resid_mid, resid_post, "
            "attn_heads, attn_out, mlp_in, mlp_in_unscaled and mlp_out it is"
        )

    def _through_skip(self, layer: int, g: Tensor, *, beside: bool) -> Tensor:
        """From a layer's output to what its MLP reads."""
        own = self.layers[layer]
        if own.skip is None:
            return g if beside else torch.zeros_like(g)
        inside = ((g * self._counted[: len(g)]) @ own.skip.T) * own.mlp[: len(g)]
        return g + inside if beside else inside

    def _to_heads(self, layer: int, g: Tensor) -> Tensor:
        """From what attention adds to the stream to its heads, concatenated."""
        own = self.layers[layer]
        if own.after is not None:
            g = g * own.after[: len(g)]
        return g @ own.output.T

    def _through_values(self, layer: int, h: Float[Tensor, "query n width"]) -> Tensor:
        """From heads to the stream before attention, over the values that they move."""
        own, (seq, n, _) = self.layers[layer], h.shape
        kv, group = own.pattern.shape[:2]
        # Heads that share their values are summed in the same product as queries.
        moved = own.pattern[:, :, :seq, :seq].permute(0, 3, 1, 2).reshape(kv, seq, group * seq)
        held = h.view(seq, n, kv, group, -1).permute(2, 3, 0, 1, 4).reshape(kv, group * seq, -1)
        z = torch.bmm(moved, held).view(kv, seq, n, -1).permute(1, 2, 0, 3).reshape(seq, n, -1)
        return (z @ own.value.T) * own.before[:seq]

    def _from_few(self, layer: int, g: Float[Tensor, "n d"], start: Start) -> Tensor:
        """The same from what attention adds, of gradients that are at one position each."""
        own, at, seq = self.layers[layer], start.positions, start.stop
        if own.after is not None:
            g = g * own.after[at, 0]
        kv, group = own.pattern.shape[:2]
        held = (g @ own.output.T).view(len(g), kv, group, -1)
        moved = own.pattern[:, :, at, :seq]
        z = torch.einsum("agnk,nagd->knad", moved, held).reshape(seq, len(g), -1)
        return (z @ own.value.T) * own.before[:seq]

    def ahead(
        self, layer: int, positions: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"]
    ) -> Iterator[Step]:
        """What vectors written at a layer's `mlp_out` become: the stream after it, and after each
        later layer's attention and MLP, `[seq, n, d_model]`; -1 is the embedding.
        """
        x = vectors.new_zeros(self.seq, *vectors.shape)
        x[positions, torch.arange(len(vectors), device=x.device)] = vectors
        if layer >= 0:
            yield Step(Site(layer, Stream.RESID_POST), x)
        for at in range(layer + 1, len(self.layers)):
            own = self.layers[at]
            yield Step(Site(at, Stream.RESID_PRE), x)
            x = x + self.attended(at, x)
            yield Step(Site(at, Stream.RESID_MID), x)
            if own.skip is not None:
                x = x + ((x * own.mlp * self._counted) @ own.skip)
            yield Step(Site(at, Stream.RESID_POST), x)

    def attended(self, layer: int, x: Float[Tensor, "seq n d_model"]) -> Float[Tensor, "seq n d"]:
        """What a layer's attention adds for a part `x` of the stream before it."""
        own = self.layers[layer]
        out = self.in_heads(layer, x).flatten(2) @ own.output
        return out if own.after is None else out * own.after

    def in_heads(
        self, layer: int, x: Float[Tensor, "seq n d_model"]
    ) -> Float[Tensor, "seq n heads d_head"]:
        """The same in each head, before they are projected."""
        own, (seq, n, _) = self.layers[layer], x.shape
        kv, group = own.pattern.shape[:2]
        values = ((x * own.before) @ own.value).view(seq, n, kv, -1)
        out = torch.einsum("agqk,knad->qnagd", own.pattern, values)
        return out.reshape(seq, n, kv * group, -1)

    @cached_property
    def _counted(self) -> Tensor:
        return self.counted[:, None, None].to(self.final.dtype)


def _layer(
    model: LanguageModel, run: Run, layer: int, skip: tuple[Stream, Tensor] | None
) -> FrozenLayer:
    block: Block = model.weights.block(layer)
    pre, heads, mid = (
        wide(run[Site(layer, s)][0])
        for s in (Stream.RESID_PRE, Stream.ATTN_HEADS, Stream.RESID_MID)
    )
    pattern = wide(run.patterns[layer][0])
    kv = block.value.shape[1] * len(pattern) // block.output.shape[0]
    output, after = block.output, None
    if block.after is not None:
        added = heads @ output + (0.0 if block.output_bias is None else block.output_bias)
        after = _inverse(added, block.eps[1])
        output = output * block.after
    bias = block.output_bias
    if skip is not None:
        matrix = skip[1].to(pre)
        skip = (skip[0], block.mlp[:, None] * matrix if skip[0] is Stream.MLP_IN else matrix)
    return FrozenLayer(
        pattern=pattern.unflatten(0, (kv, -1)),
        value=block.before[:, None] * block.value,
        value_bias=block.value_bias,
        output=output,
        output_bias=bias if bias is None or block.after is None else bias * block.after,
        before=_inverse(pre, block.eps[0]),
        after=after,
        mlp=_inverse(mid, block.eps[2]),
        mlp_gain=block.mlp,
        skip=None if skip is None else skip[1],
    )


def _inverse(x: Float[Tensor, "seq d"], eps: float) -> Float[Tensor, "seq 1 1"]:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)[:, None]


def _scattered(vectors: Tensor, start: Start) -> Float[Tensor, "seq n d"]:
    out = vectors.new_zeros(start.stop, *vectors.shape)
    out[start.positions, torch.arange(len(vectors), device=out.device)] = vectors
    return out
