"""Rows of text through the model: the activations of the tokens that count, site by site."""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.corpus import Context, TokenBatch, pack
from gemscope.lm import LanguageModel
from gemscope.sites import Site


class Forward:
    """A model that is read at `sites`, and the time it has taken."""

    def __init__(self, model: LanguageModel, sites: Sequence[Site]):
        self.model, self.sites, self.seconds = model, tuple(sites), 0.0
        self.widths = {site: model.width(site) for site in self.sites}

    def packed(
        self, rows: Iterable[Context], batch: int, tokens: int | None = None
    ) -> Iterator[TokenBatch]:
        """`rows` as batches for the model, up to `tokens` that count."""
        model = self.model
        yield from pack(rows, model.tokenizer, batch=batch, tokens=tokens, prefix=model.prefix)

    def counted(self, rows: Sequence[Context]) -> Int[Tensor, " rows"]:
        """How many tokens of each row count."""
        counts = [batch.counts.sum(1) for batch in self.packed(rows, 64)]
        return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> dict[Site, Float[Tensor, "n d"]]:
        """The activations of the tokens of `batch` that count, in the type the model gives."""
        began = time.perf_counter()
        run = self.model.run(batch, read=self.sites)
        places = batch.counts.flatten().nonzero().flatten().to(self.model.device)
        values = {site: run[site].flatten(0, 1).index_select(0, places) for site in self.sites}
        if places.is_cuda:
            torch.cuda.synchronize(places.device)
        self.seconds += time.perf_counter() - began
        return values
