"""The metric of a circuit: the model run with all that is outside of it ablated.

At every dictionary's site, in the run under way, features and error are computed from what has
arrived there; those in the circuit stay, and all others, whether or not they fired on the clean
prompt, take their ablated values (2403.19647). A circuit of everything is therefore the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.lm import Edit, Tokens
from gemscope.sae import SparseFeatures
from gemscope.steering import order, rows_that_fit

from ._sparse_case import Case, Swap
from ._sparse_space import Space

Members = tuple[Int[Tensor, " _"], bool]
"""A circuit: the nodes with these keys, or, if True, all others."""
NOTHING: Members = (torch.zeros(0, dtype=torch.int64), False)
EVERYTHING: Members = (torch.zeros(0, dtype=torch.int64), True)
_ENTRIES = 2**24
"""Entries of features in one batch."""


@dataclass(frozen=True, eq=False)
class Ablating:
    """The edits of one pass that ablate, in each row, what is outside the row's circuit."""

    case: Case
    space: Space
    circuits: list[Members]

    def steps(self) -> tuple[Edit, ...]:
        """One edit for each site, in the order of the pass."""
        sites = sorted(enumerate(self.space.sites), key=lambda pair: order(pair[1]))
        return tuple(self._step(number) for number, _ in sites)

    def _step(self, number: int) -> Edit:
        swap, site = self.case.swaps[number], self.space.sites[number]

        def function(tokens: Tokens, x: Tensor) -> Tensor:
            inside = self.space.mask(number, self.circuits, x.device)
            return ablated(x, swap, inside, tokens)

        return Edit(site, site, function, placed=True)


def ablated(
    x: Float[Tensor, "n d"], swap: Swap, inside: Bool[Tensor, "rows positions nodes"],
    tokens: Tokens,
) -> Float[Tensor, "n d"]:  # fmt: skip
    """What a site holds when all but the nodes `inside` are ablated."""
    sae, rows, positions = swap.sae, tokens.rows, tokens.positions
    where = positions if inside.shape[1] > 1 else torch.zeros_like(positions)
    free = swap.ordinary[positions]
    code = sae.encode(x.float())
    other = _at(swap.other_code, positions)

    def outside(of: SparseFeatures) -> Float[Tensor, "n d"]:
        at = of.rows
        out = ~inside[rows[at], where[at], of.indices.long()] & free[at]
        return sae.decode(replace(of, values=of.values * out)).double()

    error = x.double() - sae.decode(code).double()
    out = (~inside[rows, where, sae.d_sae] & free)[:, None]
    moved = outside(other) - outside(code) + (swap.other_error[positions] - error) * out
    return (x.double() + moved).to(x.dtype)


def _at(code: SparseFeatures, positions: Int[Tensor, " n"]) -> SparseFeatures:
    """The code of the tokens at `positions`, one after the other."""
    counts = code.counts[positions]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    starts = (code.offsets[positions] - offsets[:-1]).repeat_interleave(counts)
    entries = starts + torch.arange(len(starts), device=starts.device)
    return SparseFeatures(offsets, code.indices[entries], code.values[entries], code.d_sae)


@torch.no_grad()
def metrics_of(
    case: Case, space: Space, circuits: list[Members],
    told: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """The metric of each circuit; `told` hears how many are done."""
    length = len(case.prompt)
    entries = max((swap.other_code.indices.numel() for swap in case.swaps), default=0)
    nodes = max(b - a for a, b in zip(space.firsts, space.firsts[1:], strict=False))
    step = rows_that_fit(case.measuring.model, length)
    step = max(1, min(step, _ENTRIES // max(entries, nodes, 1)))
    found: list[float] = []
    for first in range(0, len(circuits), step):
        some = circuits[first : first + step]
        edits = (Ablating(case, space, some),)
        _, values = case.measuring.run(case.prompt.rows(len(some)), edits=edits)
        found += values.tolist()
        if told is not None:
            told(len(found))
    return found
