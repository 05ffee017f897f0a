"""The edges of a graph: a row of what comes in for every target and every feature that matters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._frozen import Frozen, Start
from ._graph import Edges
from ._influence import influence
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
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._flow = torch.zeros(sources.count, dtype=torch.float64)
        """Influence of each source over the rows made so far."""
        self._done = 0

    def rows(self, most: int) -> Rows:
        """Rows of all targets, and of every feature that influences them; at most of `most`."""
        for number, one in enumerate(self._targets):
            place = self._sources.count + number
            row = self._sources.weights(self._frozen.back(one.start), 1)
            row[0, self._sources.bias(self._own_layer(one.start))] += one.bias
            self._keep(row, torch.tensor([place]), torch.tensor([one.target.value]),
                       torch.tensor([one.target.weight], dtype=torch.float64))  # fmt: skip
        if len(self._sources.active) <= most:
            self._by_layer()
        else:
            self._by_influence(most)
        source, target, weight = (torch.cat(column) for column in zip(*self._parts, strict=True))
        return Rows(
            edges=Edges(source, target, weight), values=self._values, sums=self._sums,
            sizes=self._sizes,
        )  # fmt: skip

    def _own_layer(self, start: Start) -> int:
        return min(start.site.layer, len(self._frozen.layers) - 1)

    def _by_layer(self) -> None:
        """Every feature, from the last layer down.

        Of a layer all influence is known when it is reached, for it comes from later ones: what
        has none leads to no target and is left out.
        """
        layers = self._sources.active.layers.cpu()
        total = len(layers)
        for layer in range(len(self._frozen.layers) - 1, -1, -1):
            mine = (layers == layer).nonzero()[:, 0]
            wanted = mine[self._flow[mine] > 0]
            total -= len(mine) - len(wanted)
            self._trace(layer, wanted, total)

    def _by_influence(self, most: int) -> None:
        """The features that matter most by what is known, which is looked at again and again."""
        layers = self._sources.active.layers.cpu()
        waiting = torch.ones(len(layers), dtype=torch.bool)
        while (left := most - int((~waiting).sum())) > 0 and bool(waiting.any()):
            known = self._known()[: len(layers)].masked_fill(~waiting, -1.0)
            best = known.topk(min(left, max(64, most // 16), int(waiting.sum()))).indices
            best = best[known[best] > 0]
            if not len(best):
                return
            waiting[best] = False
            for layer in layers[best].unique().flip(0).tolist():
                self._trace(layer, best[layers[best] == layer], most)

    def _known(self) -> Float[Tensor, " n_sources"]:
        source, target, weight = (torch.cat(column) for column in zip(*self._parts, strict=True))
        n = len(self._values)
        starts = torch.zeros(n, dtype=torch.float64)
        starts[self._sources.count :] = torch.tensor([t.target.weight for t in self._targets])
        constants = torch.zeros(n, dtype=torch.bool)
        constants[: self._sources.count] = self._sources.constant.cpu()
        return influence(Edges(source, target, weight), constants, starts)[: self._sources.count]

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
            self._keep(rows, some, active.values[mine].cpu(), self._flow[some])
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
        size = max(
            8, min(512, _BATCH_BYTES // (4 * self._frozen.final.element_size() * seq * width))
        )
        yield from wanted[positions.argsort(stable=True)].split(size)

    def _keep(
        self, rows: Float[Tensor, "n n_sources"], places: Int[Tensor, " n"],
        values: Float[Tensor, " n"], flow: Float[Tensor, " n"],
    ) -> None:  # fmt: skip
        self._values[places] = values.double()
        self._sums[places] = rows.sum(1, dtype=torch.float64).cpu()
        sizes = rows.abs()
        self._sizes[places] = sizes.sum(1, dtype=torch.float64).cpu()
        # What depends on the prompt shares out the influence of the node.
        sizes.masked_fill_(self._sources.constant, 0.0)
        shares = sizes.double() / sizes.sum(1, dtype=torch.float64, keepdim=True).clamp(min=1e-10)
        self._flow += (flow.to(shares.device) @ shares).cpu()
        row, source = rows.nonzero(as_tuple=True)
        weight = rows[row, source].float().cpu()
        self._parts.append((source.int().cpu(), places.int()[row.cpu()], weight))
