"""The edges of a graph: a row of what comes in for every target and every feature that matters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._frozen import Frozen, Start
from ._graph import Edges
from ._sources import Sources
from ._targets import Aimed
from ._transcoders import Transcoders

Progress = Callable[[str, int, int], None]
"""Told `(what, done, total)`."""

_BATCH_BYTES = 2**28
"""Of one batch of gradients."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Edges into features and targets; targets are numbered after all sources."""

    edges: Edges
    values: Float[Tensor, " n_nodes"]
    """What each row should sum to, float64; NaN of nodes without one."""
    sums: Float[Tensor, " n_nodes"]
    """What it sums to."""
    sizes: Float[Tensor, " n_nodes"]
    """The sum of absolute weights."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Edges into some nodes of one layer; targets are of the layer after the last."""

    layer: int
    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    weight: Float[Tensor, " n_edges"]


class Tracer:
    """Makes rows, batch after batch, and knows how much each source matters by those made."""

    def __init__(
        self, frozen: Frozen, transcoders: Transcoders, sources: Sources, targets: Sequence[Aimed],
        progress: Progress | None,
    ):  # fmt: skip
        self._frozen, self._transcoders, self._sources = frozen, transcoders, sources
        self._targets, self._progress = targets, progress
        n = sources.count + len(targets)
        nan = torch.full((n,), float("nan"), dtype=torch.float64)
        self._values, self._sums, self._sizes = nan, nan.clone(), nan.clone()
        self._shared = torch.ones(n, dtype=torch.float64)
        """Of each row the absolute weights of what depends on the prompt, summed."""
        self._parts: list[_Part] = []
        self._done = 0

    def rows(self, most: int) -> Rows:
        """Rows of all targets, and of every feature that influences them; at most of `most`."""
        for number, one in enumerate(self._targets):
            place = self._sources.count + number
            row = self._sources.weights(self._frozen.back(one.start), 1)
            row[0, self._sources.bias(self._own_layer(one.start))] += one.bias
            self._keep(row, torch.tensor([place]), torch.tensor([one.target.value]),
                       len(self._frozen.layers))  # fmt: skip
        if int(self._leading().sum()) <= most:
            self._by_layer()
        else:
            self._by_influence(most)
        columns = [(part.source, part.target, part.weight) for part in self._parts]
        source, target, weight = (torch.cat(column) for column in zip(*columns, strict=True))
        return Rows(
            edges=Edges(source, target, weight), values=self._values, sums=self._sums,
            sizes=self._sizes,
        )  # fmt: skip

    def _own_layer(self, start: Start) -> int:
        return min(start.site.layer, len(self._frozen.layers) - 1)

    def _leading(self) -> Bool[Tensor, " n_active"]:
        """Features that may lead to a target: not those that only what comes after it reads, nor
        those of the last layer elsewhere than where a target is.
        """
        active = self._sources.active
        layers, positions = active.layers.cpu(), active.positions.cpu()
        ends = torch.tensor([one.target.position for one in self._targets])
        last = layers == len(self._frozen.layers) - 1
        return torch.where(last, torch.isin(positions, ends), positions <= ends.max())

    def _by_layer(self) -> None:
        """Every feature, from the last layer down.

        Of a layer all influence is known when it is reached, for it comes from later ones: what
        has none leads to no target and is left out.
        """
        layers, flow, told = self._sources.active.layers.cpu(), self._starts(), 0
        leading = self._leading()
        for layer in range(len(self._frozen.layers) - 1, -1, -1):
            for part in self._parts[told:]:
                self._pass(part, flow)
            told = len(self._parts)
            wanted = ((layers == layer) & leading).nonzero()[:, 0]
            leading[wanted] = flow[wanted] > 0
            self._trace(layer, wanted[flow[wanted] > 0], int(leading.sum()))

    def _by_influence(self, most: int) -> None:
        """The features that matter most by what is known, which is looked at again and again."""
        layers = self._sources.active.layers.cpu()
        waiting = self._leading()
        begun = int(waiting.sum())
        while (left := most - begun + int(waiting.sum())) > 0 and bool(waiting.any()):
            flow = self._starts()
            for part in sorted(self._parts, key=lambda part: -part.layer):
                self._pass(part, flow)
            known = flow[: len(layers)].masked_fill(~waiting, -1.0)
            best = known.topk(min(left, max(64, most // 16), int(waiting.sum()))).indices
            best = best[known[best] > 0]
            if not len(best):
                return
            waiting[best] = False
            for layer in layers[best].unique().flip(0).tolist():
                self._trace(layer, best[layers[best] == layer], most)

    def _starts(self) -> Float[Tensor, " n_nodes"]:
        out = torch.zeros(len(self._values), dtype=torch.float64)
        out[self._sources.count :] = torch.tensor([t.target.weight for t in self._targets])
        return out

    def _pass(self, part: _Part, flow: Float[Tensor, " n_nodes"]) -> None:
        """Hand on to sources what has come to the rows of `part`; later layers were before."""
        each = (flow / self._shared)[part.target] * part.weight.abs()
        flow += torch.bincount(part.source, each, minlength=len(flow))

    def _trace(self, layer: int, wanted: Int[Tensor, " n"], total: int) -> None:
        """Rows of some features of one layer."""
        active = self._sources.active
        device = active.values.device
        for some in self._batches(wanted):
            mine = some.to(device)
            features, inverse = active.features[mine].unique(return_inverse=True)
            columns, biases = self._transcoders.columns(layer, features)
            dtype = self._frozen.final.dtype
            start = Start(
                self._transcoders.reads[layer], active.positions[mine], columns.to(dtype)[inverse]
            )
            rows = self._sources.weights(self._frozen.back(start), len(mine))
            rows[:, self._sources.bias(layer)] += biases.to(dtype)[inverse]
            self._keep(rows, some, active.values[mine].cpu(), layer)
            self._done += len(some)
            if self._progress is not None:
                self._progress("features traced", self._done, total)

    def _batches(self, wanted: Int[Tensor, " n"]) -> Iterator[Tensor]:
        """Features in order of their positions, so that a batch ends at an early one."""
        if not len(wanted):
            return
        a, seq = self._sources.active, self._frozen.seq
        positions = a.positions.cpu()[wanted]
        width = max(self._frozen.layers[0].output.shape[0], len(self._frozen.final_gain))
        one = 4 * self._frozen.final.element_size() * seq * width
        size = max(8, min(512, _BATCH_BYTES // one))
        yield from wanted[positions.argsort(stable=True)].split(size)

    def _keep(
        self, rows: Float[Tensor, "n n_sources"], places: Int[Tensor, " n"],
        values: Float[Tensor, " n"], layer: int,
    ) -> None:  # fmt: skip
        self._values[places] = values.double()
        self._sums[places] = rows.sum(1, dtype=torch.float64).cpu()
        row, source = rows.nonzero(as_tuple=True)
        weight = rows[row, source]
        sizes = weight.abs().double()
        self._sizes[places] = _sums(row, sizes, len(rows))
        # What depends on the prompt shares out the influence of the node.
        shared = sizes.masked_fill(self._sources.constant[source], 0.0)
        self._shared[places] = _sums(row, shared, len(rows)).clamp(min=1e-10)
        self._parts.append(
            _Part(layer, source.int().cpu(), places.int()[row.cpu()], weight.float().cpu())
        )


def _sums(rows: Int[Tensor, " n_edges"], values: Float[Tensor, " n_edges"], n: int) -> Tensor:
    """The sum of each row, on the processor."""
    return torch.bincount(rows, values, minlength=n).cpu()
