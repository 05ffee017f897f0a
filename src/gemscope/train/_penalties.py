"""What the loss asks of features beside reconstruction: how many fire, how often, how strongly."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ._blocks import Asks, Block
from ._config import Artefact


def penalties(
    a: Artefact,
    blocks: Sequence[Block],
    counts: Int[Tensor, " batch"],
    *,
    step: int,
    aim: float,
) -> tuple[list[Asks], float]:
    """What they ask of each block, and what they cost, means over the batch.

    `counts` are the features that fire on each token, `aim` the L0 that the quadratic penalty
    pulls to. Firing often costs the sum over features of `w^2 / scale`, `w` a feature's share of
    the batch: the quadratic part of the frequency penalty that Gemma Scope 2 names without its
    weight.
    """
    s, n = a.sparsity, len(counts)
    warm = min(1.0, (step + 1) / max(s.warm_up, 1))
    if a.activation == "relu" and s.penalty == "l1":
        by_value = warm * s.coefficient / n
        cost = by_value * sum(block.total for block in blocks)
        return [Asks(_none(counts), None, by_value)] * len(blocks), cost
    if a.activation != "jumprelu":
        return [Asks(_none(counts), None, 0.0)] * len(blocks), 0.0
    by_token, cost = _by_token(a, counts.float(), warm * s.coefficient, aim)
    asks = []
    for block in blocks:
        by_feature = None
        if s.frequency:
            scale, share = warm * s.frequency / s.frequency_scale, block.fired.float() / n
            by_feature = share * (2 * scale / n)
            cost += scale * float(share.square().sum())
        asks.append(Asks(by_token, by_feature, 0.0))
    return asks, cost


def _by_token(a: Artefact, counts: Tensor, scale: float, aim: float) -> tuple[Tensor, float]:
    """The derivative of the L0 penalty by the firing of a feature on each token, and its cost."""
    n = len(counts)
    if a.sparsity.penalty == "quadratic":
        over = counts - aim
        cost = float(over.square().mean()) * 2 * scale / a.l0
        return over * (4 * scale / (a.l0 * n)), cost
    if a.sparsity.penalty == "linear":
        return _none(counts) + scale / n, scale * float(counts.mean())
    return _none(counts), 0.0


def _none(counts: Tensor) -> Tensor:
    return torch.zeros(len(counts), device=counts.device)
