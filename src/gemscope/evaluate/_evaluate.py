"""Evaluate dictionaries on text: two passes, everything else is sums.

The first pass reads the activations for their mean (what FVU and mean ablation are measured
against) and keeps a sample for the random baseline. The second runs the model clean, spliced and
ablated, all dictionaries on the same batches. Activations are cast to float32 before a dictionary
sees them, and sums are float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemscope.corpus import Document, TokenBatch, contexts, pack
from gemscope.errors import InputError
from gemscope.lm import LanguageModel, replace, splice
from gemscope.sae import CrossLayer, Dictionary
from gemscope.sites import Site, each

from ._importance import importance_uniformity
from ._losses import Losses
from ._pass import Evaluation, Pass

Progress = Callable[[str, int, int], None]
"""Called with what is being done, tokens done and tokens in all."""

_LOGIT_BYTES = 64 * 2**20
_SAMPLE = 2_048
_IMPORTANCE_TOKENS = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to evaluate; written beside the figures."""

    tokens: int = 65_536
    """Counted tokens at most."""
    context: int = 1_024
    """Tokens of a context, BOS included; at most what the model was made for."""
    batch: int | None = None
    """Contexts of a batch; None takes what keeps the logits within 64 MiB."""
    seed: int = 0
    layers: tuple[int, ...] | None = None
    """Layers in which a multi-layer model is spliced for the main figures; None is all together."""
    count_prefix: bool = False
    """Whether the tokens that begin a user's turn in a chat count: outliers, so not by default."""

    def __post_init__(self):
        if self.tokens < 2:
            raise InputError(f"{self.tokens} tokens cannot be evaluated on; take 2 or more")
        if self.context < 2:
            raise InputError(
                f"a context of {self.context} tokens has no room after BOS; take 2 or more"
            )
        if self.batch is not None and self.batch < 1:
            raise InputError(f"a batch of {self.batch} contexts is none; take 1 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed} is not between 0 and {2**32 - 1}")


def evaluate(
    model: LanguageModel,
    saes: Sequence[Dictionary],
    documents: Sequence[Document],
    settings: Settings = Settings(),
    progress: Progress = lambda *_: None,
) -> list[Evaluation]:
    """Evaluate each of `saes` on `documents`, spliced into `model` one at a time."""
    for sae in saes:
        model.check_widths(sae)
    spliced = [_spliced(sae, settings) for sae in saes]
    batches = _batches(model, documents, settings)
    total = sum(b.n_counted for b in batches)
    with torch.no_grad():
        means, samples = _first_pass(model, saes, batches, progress, total)
        context = min(settings.context, model.max_context)
        passes = [
            Pass(sae, means, samples, seed=settings.seed, context=context, at=at)
            for sae, at in zip(saes, spliced, strict=True)
        ]
        done, first = 0, 0
        for batch in batches:
            _second_pass(model, passes, batch, first, means)
            done, first = done + batch.n_counted, first + batch.ids.numel()
            progress("splicing and ablating", done, total)
    return [
        one.result(_uniformity(model, one.sae, batches), settings.seed, batches) for one in passes
    ]


def _spliced(sae: Dictionary, settings: Settings) -> tuple[Site, ...]:
    """The sites that are replaced together for the main figures."""
    sites = each(sae.writes)
    if settings.layers is None or not isinstance(sae, CrossLayer):
        return sites
    chosen = tuple(site for site in sites if site.layer in settings.layers)
    if absent := sorted(set(settings.layers) - {site.layer for site in chosen}):
        raise InputError(
            f"{sae.origin.address or 'the model'} writes {sae.writes}, and not in layer {absent[0]}"
        )
    return chosen


def _batches(
    model: LanguageModel, documents: Sequence[Document], settings: Settings
) -> list[TokenBatch]:
    length = min(settings.context, model.max_context)
    fit = _LOGIT_BYTES // (4 * length * model.config.vocab_size)
    rows = contexts(documents, model.tokenizer, length=length)
    batch = settings.batch or min(16, max(1, fit))
    prefix = None if settings.count_prefix else model.prefix
    found = list(pack(rows, model.tokenizer, batch=batch, tokens=settings.tokens, prefix=prefix))
    counted = sum(b.n_counted for b in found)
    if counted < 2:
        raise InputError(
            f"the text holds {counted} tokens that count (special tokens do not); "
            "give at least 2 ordinary ones"
        )
    return found


def _first_pass(
    model: LanguageModel,
    saes: Sequence[Dictionary],
    batches: list[TokenBatch],
    progress: Progress,
    total: int,
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    sites = _sites(saes)
    sums = {s: torch.zeros(model.width(s), dtype=torch.float64, device=model.device) for s in sites}
    samples: dict[Site, Tensor] = {}
    done = 0
    for batch in batches:
        run = model.run(batch, read=sites)
        counts = batch.counts.to(model.device)
        for site in sites:
            x = run[site][counts].float()
            sums[site] += x.double().sum(0)
            have = samples.get(site, x[:0])
            samples[site] = torch.cat((have, x[: _SAMPLE - len(have)]))
        done += batch.n_counted
        progress("reading activations", done, total)
    return {site: s / total for site, s in sums.items()}, samples


def _sites(saes: Sequence[Dictionary]) -> list[Site]:
    return sorted({s for sae in saes for some in (sae.reads, sae.writes) for s in each(some)})


def _second_pass(
    model: LanguageModel, passes: list[Pass], batch: TokenBatch, first: int, means: dict
) -> None:
    counts = batch.counts.to(model.device)
    rows, positions = batch.counts.nonzero(as_tuple=True)
    documents = batch.documents[rows]
    places = first + rows * batch.ids.shape[1] + positions
    clean = model.run(batch, read=_sites([p.sae for p in passes]), logits=True)
    reference = Losses(clean.logits, batch)
    ones = torch.ones_like(reference.clean)
    ablated: dict[tuple[Site, ...], dict[str, Tensor]] = {}
    for one in passes:
        x, y = clean[one.sae.reads][counts], clean[one.sae.writes][counts]
        one.add_reconstruction(x, y, documents, positions, places)
        if one.at not in ablated:
            ablated[one.at] = _ablated(model, batch, reference, one.at, means)
        for dictionary, sums in one.dictionaries:
            logits = model.run(batch, edits=[one.edit(dictionary)], logits=True).logits
            sums.add(
                reference.documents,
                targets=ones,
                clean=reference.clean,
                spliced=reference.loss_of(logits),
                **ablated[one.at],
            )
            sums.add(documents, kl=reference.divergence_of(logits))
        for site, sums in one.layers.items():
            logits = model.run(batch, edits=[splice(one.sae, [site])], logits=True).logits
            sums.add(
                reference.documents,
                targets=ones,
                clean=reference.clean,
                spliced=reference.loss_of(logits),
            )


def _ablated(
    model: LanguageModel,
    batch: TokenBatch,
    reference: Losses,
    at: tuple[Site, ...],
    means: dict[Site, Tensor],
) -> dict[str, Tensor]:
    """Losses with zeros, and with mean activations, at all of `at`."""
    out = {}
    for name in ("zero", "mean"):
        edits = [
            replace(site, means[site] if name == "mean" else torch.zeros_like(means[site]))
            for site in at
        ]
        out[name] = reference.loss_of(model.run(batch, edits=edits, logits=True).logits)
    return out


def _uniformity(model: LanguageModel, sae: Dictionary, batches: list[TokenBatch]) -> float:
    if isinstance(sae, CrossLayer):
        # The layers' effects run through each other; the paper's definition is for one site.
        return float("nan")
    found, tokens = [], 0
    for batch in batches:
        found.append(importance_uniformity(model, sae, batch).cpu())
        tokens += batch.n_counted
        if tokens >= _IMPORTANCE_TOKENS:
            break
    return float(torch.cat(found).mean()) if found else float("nan")
