"""Everything that edges come from, and what gradients say that each of them adds."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.lm import Run
from gemscope.sites import Site, Stream

from ._frozen import Frozen, Step
from ._graph import Kind, Node
from ._transcoders import Active, Transcoders

_BLOCK = 2**25
"""Numbers of decoder rows gathered at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Written:
    """What is written to one layer's `mlp_out`: rows of numbers, and where each is used.

    Padding in `which` points at row 0 and is not in `valid`.
    """

    rows: Float[Tensor, "n_rows d_model"]
    which: Int[Tensor, "seq most"]
    valid: Int[Tensor, " n_entries"]
    """Places in `which`, flattened."""
    columns: Int[Tensor, " n_entries"]
    """The source that each of these is."""
    scales: Float[Tensor, " n_entries"]


class Sources:
    """The sources of a graph, in the order of its nodes: features, errors, BOS, tokens, biases."""

    def __init__(self, frozen: Frozen, transcoders: Transcoders, active: Active, run: Run):
        self._frozen, self._transcoders, self.active = frozen, transcoders, active
        self._n_layers, self._seq = len(frozen.layers), frozen.seq
        dtype = frozen.final.dtype
        self._embeddings = run[Site(0, Stream.RESID_PRE)][0].to(dtype)
        outputs = [run[site][0].to(dtype) for site in transcoders.writes]
        self._rest = [out - y.to(dtype) for out, y in zip(outputs, active.outputs, strict=True)]
        counted = frozen.counted
        self._places = {True: counted.nonzero()[:, 0], False: (~counted).nonzero()[:, 0]}
        many = {c: len(p) for c, p in self._places.items()}
        self._first_error = len(active)
        self._first_bos = self._first_error + self._n_layers * many[True]
        self._first_embedding = self._first_bos + self._n_layers * many[False]
        self._first_bias = self._first_embedding + self._seq
        self.count = self._first_bias + self._n_layers
        """Sources in all."""
        self._written = [self._of_layer(layer) for layer in range(self._n_layers)]

    def bias(self, layer: int) -> int:
        """The source that a layer's constants are counted in."""
        return self._first_bias + layer

    @cached_property
    def constant(self) -> Tensor:
        """Bool `[count]`: whether a source depends on nothing that the prompt says."""
        out = torch.zeros(self.count, dtype=torch.bool, device=self._embeddings.device)
        out[self._first_bos : self._first_embedding] = True
        out[self._first_bias :] = True
        return out

    def nodes(self) -> list[Node]:
        """A node for each source."""
        a = self.active
        out = [
            Node(Kind.FEATURE, layer, position, feature, value)
            for layer, position, feature, value in zip(
                a.layers.tolist(), a.positions.tolist(), a.features.tolist(), a.values.tolist(),
                strict=True,
            )
        ]  # fmt: skip
        for kind, counted in ((Kind.ERROR, True), (Kind.BOS, False)):
            places = self._places[counted]
            for layer, rest in enumerate(self._rest):
                norms = rest[places].float().norm(dim=-1).tolist()
                out += [
                    Node(kind, layer, position, activation=norm)
                    for position, norm in zip(places.tolist(), norms, strict=True)
                ]
        norms = self._embeddings.float().norm(dim=-1).tolist()
        out += [Node(Kind.EMBEDDING, None, p, activation=norm) for p, norm in enumerate(norms)]
        for layer in range(self._n_layers):
            norm = float(self._transcoders.bias(layer).norm())
            out.append(Node(Kind.BIAS, layer, activation=norm))
        return out

    def weights(self, steps: Iterable[Step], n: int) -> Float[Tensor, "n n_sources"]:
        """What each source adds, from gradients on their way back."""
        out = self._embeddings.new_zeros(n, self.count)
        for step in steps:
            layer, g = step.site.layer, step.gradient
            own = self._frozen.layers[layer]
            match step.site.stream:
                case Stream.MLP_OUT:
                    self._mlp(out, layer, g)
                case Stream.ATTN_OUT if own.output_bias is not None:
                    bias = own.output_bias.expand(self._seq, -1)
                    if own.after is not None:
                        bias = bias * own.after[:, 0]
                    out[:, self.bias(layer)] += torch.einsum("snd,sd->n", g, bias[: len(g)])
                case Stream.ATTN_HEADS if own.value_bias is not None:
                    # A pattern's rows sum to 1: what all values have in common passes unchanged.
                    kv, group = own.pattern.shape[:2]
                    bias = own.value_bias.view(kv, 1, -1).expand(-1, group, -1).reshape(-1)
                    out[:, self.bias(layer)] += g.sum(0) @ bias
                case Stream.EMBED:
                    first = self._first_embedding
                    part = torch.einsum("snd,sd->ns", g, self._embeddings[: len(g)])
                    out[:, first : first + len(g)] += part
        return out

    def _mlp(self, out: Tensor, layer: int, g: Float[Tensor, "seq n d"]) -> None:
        own = self._written[layer]
        most, d = own.which.shape[1], g.shape[2]
        block = max(1, _BLOCK // (most * d))
        for first in range(0, len(g), block):
            stop = min(first + block, len(g))
            rows = own.rows[own.which[first:stop]]
            found = torch.bmm(g[first:stop], rows.transpose(1, 2)).transpose(0, 1)
            begin, end = (
                int(torch.searchsorted(own.valid, place * most)) for place in (first, stop)
            )
            places = own.valid[begin:end] - first * most
            parts = found.reshape(len(found), -1)[:, places] * own.scales[begin:end]
            out[:, own.columns[begin:end]] += parts
        counted = self._places[True]
        bias = self._transcoders.bias(layer).to(g.dtype)
        out[:, self.bias(layer)] += g[counted[counted < len(g)]].sum(0) @ bias

    def _of_layer(self, layer: int) -> _Written:
        """What is written in a layer: features, and at each position the rest of the output."""
        a, seq = self.active, self._seq
        device, dtype = a.values.device, self._embeddings.dtype
        places, columns, which, scales, rows = [], [], [], [], []
        used = 0
        for read in range(self._n_layers):
            if layer not in self._transcoders.written(read):
                continue
            mine = (a.layers == read).nonzero()[:, 0]
            features, inverse = a.features[mine].unique(return_inverse=True)
            rows.append(self._transcoders.rows(read, features, layer).to(dtype))
            places.append(a.positions[mine])
            columns.append(mine)
            which.append(inverse + used)
            scales.append(a.values[mine].to(dtype))
            used += len(features)
        rows.append(self._rest[layer])
        places.append(torch.arange(seq, device=device))
        columns.append(self._rest_columns(layer))
        which.append(torch.arange(used, used + seq, device=device))
        scales.append(torch.ones(seq, dtype=dtype, device=device))
        place, order = torch.cat(places).sort(stable=True)
        counts = torch.bincount(place, minlength=seq)
        most = int(counts.max())
        begins = counts.cumsum(0) - counts
        valid = place * most + torch.arange(len(place), device=device) - begins[place]
        padded = torch.zeros(seq * most, dtype=torch.int64, device=device)
        padded[valid] = torch.cat(which)[order]
        return _Written(
            rows=torch.cat(rows), which=padded.view(seq, most), valid=valid,
            columns=torch.cat(columns)[order], scales=torch.cat(scales)[order],
        )  # fmt: skip

    def _rest_columns(self, layer: int) -> Tensor:
        """The sources that are what transcoders leave of a layer's output, by position."""
        out = torch.empty(self._seq, dtype=torch.int64, device=self._embeddings.device)
        for counted, begin in ((True, self._first_error), (False, self._first_bos)):
            places = self._places[counted]
            many = len(places)
            out[places] = begin + layer * many + torch.arange(many, device=places.device)
        return out
