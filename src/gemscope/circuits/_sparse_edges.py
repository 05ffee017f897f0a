"""Edges: how much of a node's effect on the metric passes through each later node.

The edge from `u` to `d` is `grad_d m . (d d / d u) . (u' - u)` (2403.19647): the slope of the
metric at `d`, times the slope of `d` by `u`, times how far `u` moves. The slope of `d` by `u` is
that of the direct way: gradients end at every dictionary's site in between, whatever it holds is
taken for a constant there. A feature's slope by what arrives at its site is its encoder column
where it fires and 0 elsewhere; the error's is what is left of the identity. So for attribution
patching the edges from `u` to all nodes of all later sites, the errors among them, and to the
metric itself, which is what no later site lies in the way of, sum to the effect of `u`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.sae import weighted_sums
from gemscope.steering import rows_that_fit

from ._sparse_case import Case, Swap
from ._sparse_effects import Gradients, adding, zeros_at
from ._sparse_space import Space

_ROWS = 16
"""Later nodes whose gradients are taken in one backward pass, at most."""
_NUMBERS = 2**26
"""Numbers in one product."""


@dataclass(frozen=True, eq=False)
class Moves:
    """How the nodes of a site move what is there, entry by entry."""

    owners: Int[Tensor, " n"]
    """Place of the node among those asked for."""
    positions: Int[Tensor, " n"]
    vectors: Float[Tensor, "n d"]


def edges_of(
    case: Case, space: Space, slopes: Gradients, nodes: Int[Tensor, " n_nodes"],
    told: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n_nodes n_targets"]:  # fmt: skip
    """Edges among `nodes`, given by ascending key, and in the last column to the metric; float64.

    A row is what a node gives; the columns are the same nodes and the metric.
    """
    model, count = case.measuring.model, len(nodes)
    out = torch.zeros(count, count + 1, dtype=torch.float64)
    sites = range(len(space.sites))
    own = [((nodes >= space.firsts[s]) & (nodes < space.firsts[s + 1])).nonzero()[:, 0]
           for s in sites]  # fmt: skip
    most = max([1, *(len(one) for one in own)])
    rows = max(1, min(_ROWS, most, rows_that_fit(model, len(case.prompt))))
    moves = [_moves(case.swaps[s], space, s, nodes[own[s]], own[s]) for s in sites]
    with torch.enable_grad():
        zeros = [zeros_at(case, s, rows).requires_grad_() for s in sites]
        edits = tuple(adding(space.sites[s], zeros[s], cut=True) for s in sites)
        run, value = case.measuring.run(case.prompt.rows(rows), edits=edits, read=space.sites)
        found = torch.autograd.grad(value[0], zeros, retain_graph=True, allow_unused=True)
    for s in sites:
        _put(out, [count], _row(found[s], 0, 1), moves[s])
    done = 0
    for s in sites:
        there = run.values[space.sites[s]]
        for first in range(0, len(own[s]), rows):
            some = own[s][first : first + rows]
            aims = _aims(case.swaps[s], space, s, nodes[some], slopes[s])
            done += len(some)
            if there.requires_grad and s:
                aims = torch.cat((aims, aims.new_zeros(rows - len(some), *aims.shape[1:])))
                found = torch.autograd.grad(
                    there, zeros[:s], aims.to(there.dtype), retain_graph=True, allow_unused=True
                )
                for u in range(s):
                    _put(out, some.tolist(), _row(found[u], 0, len(some)), moves[u])
            if told is not None:
                told(done, count)
    return out


def _row(found: Tensor | None, first: int, stop: int) -> Tensor | None:
    return None if found is None else found[first:stop].detach().double()


@torch.no_grad()
def _put(out: Tensor, columns: list[int], slopes: Tensor | None, moves: Moves) -> None:
    """Add, to some columns of `out`, slopes `[columns, seq, d]` times moves."""
    if slopes is None or not len(moves.owners):
        return
    step = max(1, _NUMBERS // (len(columns) * moves.vectors.shape[1]))
    for first in range(0, len(moves.owners), step):
        part = slice(first, first + step)
        products = torch.einsum("rnd,nd->nr", slopes[:, moves.positions[part]],
                                moves.vectors[part]).cpu()  # fmt: skip
        block = torch.zeros(len(out), len(columns), dtype=torch.float64)
        block.index_add_(0, moves.owners[part].cpu(), products)
        out[:, columns] += block


@torch.no_grad()
def _moves(
    swap: Swap, space: Space, site: int, keys: Int[Tensor, " n"], places: Int[Tensor, " n"]
) -> Moves:
    """How the nodes with `keys`, all of one site and ascending, move it: `u' - u` at each place."""
    device, width = swap.ordinary.device, swap.sae.d_sae
    entries = swap.entries()
    where = swap.ordinary.nonzero()[:, 0]
    at = space.keys(site, entries.positions, entries.features)
    errors_at = space.keys(site, where, torch.full_like(where, width))
    known = torch.cat((at, errors_at))
    keys, places = keys.to(device), places.to(device)
    if not len(keys):
        nothing = where[:0]
        return Moves(nothing, nothing, swap.error[:0])
    place = torch.searchsorted(keys, known).clamp_max(len(keys) - 1)
    kept = keys[place] == known
    of_features, of_errors = kept[: len(at)], kept[len(at) :]
    rows = swap.sae.w_dec[entries.features[of_features]].double()
    vectors = torch.cat((rows * entries.moved[of_features, None],
                         swap.error_moved[where[of_errors]]))  # fmt: skip
    positions = torch.cat((entries.positions[of_features], where[of_errors]))
    return Moves(places[place[kept]], positions, vectors)


@torch.no_grad()
def _aims(
    swap: Swap, space: Space, site: int, keys: Int[Tensor, " n"], slope: Float[Tensor, "seq d"]
) -> Float[Tensor, "n seq d"]:
    """What each node makes of the metric by what arrives at its site: `grad_d m . (d d / d x)`."""
    sae, code = swap.sae, swap.code
    g = slope.double() * swap.ordinary[:, None]
    out = g.new_zeros(len(keys), *g.shape)
    rows, indices = code.rows, code.indices.long()
    at = space.keys(site, rows, indices)
    left = None
    for number, key in enumerate(keys.tolist()):
        position, feature = divmod(key - space.firsts[site], sae.d_sae + 1)
        if feature < sae.d_sae:
            mine = rows[at == key]
            column = sae.columns([feature])[:, 0].double()
            by = g[mine] @ sae.w_dec[feature].double()
            out[number, mine] = by[:, None] * column
        else:
            left = g - _through(swap, g) if left is None else left
            at_node = slice(None) if space.length is None else position
            out[number, at_node] = left[at_node]
    return out


def _through(swap: Swap, g: Float[Tensor, "seq d"]) -> Float[Tensor, "seq d"]:
    """The part of the slope at a site that its features carry: encoder columns of what fires."""
    sae, code = swap.sae, swap.code
    used, own = code.indices.long().unique(return_inverse=True)
    if not len(used):
        return torch.zeros_like(g)
    by = (g[code.rows] * sae.w_dec[used].double()[own]).sum(1)
    columns = sae.columns(used.tolist()).T.contiguous()
    return weighted_sums(code.offsets, own, by.float(), columns).double()
