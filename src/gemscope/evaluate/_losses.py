"""Losses and divergences of a batch, computed a few tokens at a time: a vocabulary is wide."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gemscope.corpus import TokenBatch

_CHUNK = 512


class Losses:
    """Losses and divergences of one batch against its clean run."""

    def __init__(self, logits: Tensor, batch: TokenBatch):
        self.logits = logits
        self.counts = batch.counts.to(logits.device)
        # Every counted token is a target once, the first of a context predicted from BOS. A
        # context without BOS has no prediction for its first token.
        self.targets = self.counts[:, 1:]
        self.wanted = batch.ids.to(logits.device)[:, 1:][self.targets]
        self.documents = batch.documents[batch.counts[:, 1:].nonzero(as_tuple=True)[0]]
        self.clean = self.loss_of(logits)

    def loss_of(self, logits: Float[Tensor, "batch seq vocab"]) -> Tensor:
        """Cross-entropy of every target `[n]`."""
        losses = [
            F.cross_entropy(some.float(), wanted, reduction="none")
            for some, wanted in zip(
                _chunks(logits[:, :-1], self.targets), self.wanted.split(_CHUNK), strict=True
            )
        ]
        return torch.cat(losses)

    def divergence_of(self, logits: Float[Tensor, "batch seq vocab"]) -> Tensor:
        """Kullback-Leibler divergence from the clean run at every counted token `[n]`."""
        divergences = []
        for mine, theirs in zip(
            _chunks(self.logits, self.counts), _chunks(logits, self.counts), strict=True
        ):
            clean, other = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
            divergences.append(F.kl_div(other, clean, log_target=True, reduction="none").sum(-1))
        return torch.cat(divergences)


def _chunks(logits: Tensor, mask: Bool[Tensor, "batch seq"]) -> Iterator[Tensor]:
    """The rows of `logits` where `mask` is True, a few at a time."""
    rows, columns = mask.nonzero(as_tuple=True)
    for some in zip(rows.split(_CHUNK), columns.split(_CHUNK), strict=True):
        yield logits[some]
