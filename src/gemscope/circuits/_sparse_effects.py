"""Estimated effects of nodes: what the metric does when a node is ablated.

With `g` the gradient of the metric at a dictionary's site, a feature's effect is about
`(g . d) (f' - f)` and the error's `g . (error' - error)`. `g` is that at the clean run (attribution
patching), one backward pass for all sites, or its mean on the straight way from what the site holds
to what it is ablated to (integrated gradients, 2403.19647), `steps` passes a site. The effects of
the nodes of a site, the error among them, then sum to what ablating the whole site does, better
with more steps. Gradients pass a site as they do in the model: that its features and its error are
functions of what arrives there changes nothing, as together they are the identity.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import Edit, Tokens
from gemscope.sae import row_offsets, sampled_products
from gemscope.sites import Site
from gemscope.steering import rows_that_fit

from ._sparse_case import Case
from ._sparse_space import Space

Gradients = tuple[Float[Tensor, "seq _"], ...]
"""Of the metric at each dictionary's site."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Estimates for the nodes that change in one example, by ascending key, float64."""

    keys: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


def adding(site: Site, zero: Tensor, *, cut: bool = False) -> Edit:
    """Adds `zero` `[rows, seq, d]` to a site; with `cut`, gradients end there."""

    def function(tokens: Tokens, x: Tensor) -> Tensor:
        more = zero[tokens.rows, tokens.positions].to(x.dtype)
        return (x.detach() if cut else x) + more

    return Edit(site, site, function, placed=True)


def zeros_at(case: Case, number: int, rows: int) -> Float[Tensor, "rows seq d"]:
    """What gradients at a site are taken by."""
    model, swap = case.measuring.model, case.swaps[number]
    dtype = torch.float64 if model.dtype is torch.float64 else torch.float32
    shape = (rows, len(case.prompt), swap.sae.d_out)
    return torch.zeros(shape, dtype=dtype, device=model.device)


def gradients(case: Case, space: Space, method: str, steps: int) -> Gradients:
    """The gradient of the metric at each site, by `method`: `attribution` or `integrated`."""
    if method == "integrated":
        return tuple(_integrated(case, space, n, steps) for n in range(len(space.sites)))
    with torch.enable_grad():
        zeros = [zeros_at(case, n, 1).requires_grad_() for n in range(len(space.sites))]
        edits = tuple(map(adding, space.sites, zeros))
        _, value = case.measuring.run(case.prompt.batch, edits=edits)
        _check_slope(case, value)
        found = torch.autograd.grad(value.sum(), zeros)
    return tuple(one[0] for one in found)


def _integrated(case: Case, space: Space, number: int, steps: int) -> Float[Tensor, "seq d"]:
    """The mean gradient at one site on the way to its ablated value, by the midpoint rule."""
    moved = case.swaps[number].moved
    shares = (torch.arange(steps, dtype=torch.float64, device=moved.device) + 0.5) / steps
    total = torch.zeros_like(moved)
    step = rows_that_fit(case.measuring.model, len(case.prompt))
    for first in range(0, steps, step):
        some = shares[first : first + step]
        like = zeros_at(case, number, 1)
        with torch.enable_grad():
            way = (some[:, None, None] * moved).to(like.dtype).requires_grad_()
            edits = (adding(space.sites[number], way),)
            _, value = case.measuring.run(case.prompt.rows(len(some)), edits=edits)
            (found,) = torch.autograd.grad(value.sum(), way)
        total += found.double().sum(0)
    return (total / steps).to(zeros_at(case, number, 1).dtype)


def _check_slope(case: Case, value: Tensor) -> None:
    metric = case.measuring.metric
    if metric.feature is not None and float(value.detach()[0]) == 0:
        raise InputError(
            f"{metric} is 0 on the clean prompt, where its slope is 0 too: take a position where "
            "it fires with at, or another metric"
        )


@torch.no_grad()
def effects_of(case: Case, space: Space, slopes: Gradients) -> Effects:
    """Estimates for every feature that changes, and every error."""
    keys, values = [], []
    for number, (swap, g) in enumerate(zip(case.swaps, slopes, strict=True)):
        entries = swap.entries()
        used, own = entries.features.unique(return_inverse=True)
        offsets = row_offsets(entries.positions, len(case.prompt))
        rows = swap.sae.w_dec[used].float()
        products = sampled_products(offsets, own, g.float().contiguous(), rows)
        keys.append(space.keys(number, entries.positions, entries.features))
        values.append(products.double() * entries.moved)
        where = swap.ordinary.nonzero()[:, 0]
        keys.append(space.keys(number, where, torch.full_like(where, swap.sae.d_sae)))
        values.append((g.double() * swap.error_moved).sum(1)[where])
    key, inverse = torch.cat(keys).cpu().unique(return_inverse=True)
    total = torch.zeros(len(key), dtype=torch.float64)
    return Effects(key, total.index_add_(0, inverse, torch.cat(values).cpu()))
