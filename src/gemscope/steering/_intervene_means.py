"""Mean ablation: what targets hold on average over a text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemscope.corpus import contexts, pack, read_text
from gemscope.lm import LanguageModel
from gemscope.sites import Site

from ._intervene_view import Means, View
from ._target import Target, reads_of

TOKENS = 10_000
"""Tokens that a mean is taken over, at most."""
_CONTEXT, _BATCH = 128, 8


@torch.no_grad()
def means(
    model: LanguageModel,
    targets: Sequence[Target],
    source: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Means:
    """Means over the first `TOKENS` ordinary tokens of a text, as `corpus.read_text` reads it."""
    rows = contexts(
        read_text(source), model.tokenizer, length=min(_CONTEXT, model.max_context)
    )  # fmt: skip
    reads = reads_of(targets)
    sums: dict[tuple[int, Site], Tensor] = {}
    seen = 0
    for batch in pack(rows, model.tokenizer, batch=_BATCH, tokens=TOKENS, prefix=model.prefix):
        run = model.run(batch, read=reads)
        counts = batch.counts.to(model.device)
        view = View({site: value[counts] for site, value in run.values.items()})
        for target in targets:
            for site in target.writes:
                total = view.held(target, site).double().sum(0)
                key = id(target), site
                sums[key] = sums[key] + total if key in sums else total
        seen += batch.n_counted
        if progress is not None:
            progress("means", min(seen, TOKENS), TOKENS)
    return Means({key: total / seen for key, total in sums.items()})
