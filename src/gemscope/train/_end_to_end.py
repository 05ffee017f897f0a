"""Whole contexts instead of shuffled tokens, with the way through the rest of the model.

For finetuning on what a dictionary does to the model's predictions (2503.17272), a step needs the
contexts that its activations come from: reconstructions take their place at every token that
counts, and the KL from the model's own predictions flows back to them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.activations import ActivationBatch, Position
from gemscope.corpus import Context, pack
from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel
from gemscope.sites import Site

from ._learner import Through


@dataclass(frozen=True, slots=True)
class ThroughBatch(ActivationBatch):
    """A batch whose reconstructions can be sent through the model."""

    through: Callable[[float], Through]
    """Given the scale of normalised reconstructions, how they do."""


class ThroughStream:
    """Batches of whole contexts, of about `batch` tokens, in a seeded order that epochs change."""

    def __init__(
        self, model: LanguageModel, rows: Sequence[Context], site: Site, *, batch: int, seed: int
    ):
        self.model, self.site, self.batch, self.seed = model, site, batch, seed
        self.sites: tuple[Site, ...] = (site,)
        special = set(model.tokenizer.all_special_ids)
        self._counts = [sum(t not in special for t in row.ids) for row in rows]
        self.rows, self.tokens, self.model_seconds = list(rows), sum(self._counts), 0.0
        if self.tokens < batch:
            raise InputError(
                f"the text has {self.tokens} tokens that count, less than one batch of {batch}; "
                "give more text or a smaller batch"
            )

    def sample(self, tokens: int) -> dict[Site, Float[Tensor, "n d"]]:
        """Activations of the first contexts, at least `tokens` where there are so many."""
        found: list[Tensor] = []
        for batch in self.batches():
            found.append(batch.values[self.site].float())
            if sum(map(len, found)) >= min(tokens, self.tokens):
                break
        return {self.site: torch.cat(found)[:tokens]}

    def batches(
        self, start: Position = Position(), stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ThroughBatch]:
        """Batches from `start` on, without end, until `stopping()`."""
        epoch, first = start.round, start.batch
        while True:
            groups = self._groups(epoch)
            for place in range(first, len(groups)):
                if stopping():
                    return
                last = place + 1 == len(groups)
                after = Position(epoch + 1, 0) if last else Position(epoch, place + 1)
                yield self._batch([self.rows[i] for i in groups[place]], after)
            epoch, first = epoch + 1, 0

    def _groups(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        groups: list[list[int]] = [[]]
        size = 0
        for place in torch.randperm(len(self.rows), generator=generator).tolist():
            if size >= self.batch:
                groups.append([])
                size = 0
            groups[-1].append(place)
            size += self._counts[place]
        return groups if size >= self.batch or len(groups) == 1 else groups[:-1]

    @torch.no_grad()
    def _batch(self, rows: list[Context], after: Position) -> ThroughBatch:
        began = time.perf_counter()
        ordered = sorted(rows, key=lambda row: len(row.ids))
        (tokens,) = pack(
            ordered, self.model.tokenizer, batch=len(ordered), prefix=self.model.prefix
        )
        run = self.model.run(tokens, read=[self.site], logits=True)
        counts = tokens.counts.to(self.model.device)
        x = run[self.site][counts].float()
        clean = F.log_softmax(run.logits[counts].float(), dim=-1)
        self.model_seconds += time.perf_counter() - began

        def through(scale: float) -> Through:
            def of(made: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], float]:
                began = time.perf_counter()
                with torch.enable_grad():
                    leaf = made.detach().clone().requires_grad_()
                    edit = Edit(self.site, self.site, lambda _: leaf * scale)
                    logits = self.model.run(tokens, edits=[edit], logits=True).logits[counts]
                    kl = F.kl_div(
                        F.log_softmax(logits.float(), dim=-1), clean, log_target=True,
                        reduction="batchmean",
                    )  # fmt: skip
                    (slope,) = torch.autograd.grad(kl, leaf)
                self.model_seconds += time.perf_counter() - began
                return slope, float(kl.detach())

            return of

        return ThroughBatch({self.site: x}, after, through)
