"""Evaluate dictionaries on text: two passes, everything else is sums.

The first pass reads the activations for their mean (what FVU and mean ablation are measured
against) and keeps a sample for the random baseline. The second runs the model clean, spliced and
ablated, all dictionaries on the same batches. Activations are cast to float32 before a dictionary
sees them, and sums are float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemscope.corpus import Document, TokenBatch, contexts, pack
from gemscope.errors import InputError
from gemscope.lm import LanguageModel, replace, splice
from gemscope.sae import SAE
from gemscope.sites import Site

from ._baseline import random_dictionary
from ._importance import importance_uniformity
from ._metrics import SUMS, formulas
from ._statistics import FeatureStatistics, PositionProfile, density_histogram
from ._sums import DocumentSums

Progress = Callable[[str, int, int], None]
"""Called with what is being done, tokens done and tokens in all."""

_LOGIT_BYTES = 64 * 2**20
_CHUNK = 512
_SAMPLE = 2_048
_IMPORTANCE_TOKENS = 4_096
_CONTEXTS = 3


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything measured of one dictionary."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    """95% intervals over documents of the metrics that are ratios of sums."""
    baseline: dict[str, float]
    """The same metrics for a random dictionary of the same shape and L0."""
    tokens: int
    documents: int
    density: dict[str, list]
    positions: list[dict[str, int | float]]
    statistics: FeatureStatistics = field(repr=False)
    batches: list[TokenBatch] = field(repr=False)


def evaluate(
    model: LanguageModel,
    saes: Sequence[SAE],
    documents: Sequence[Document],
    settings: Settings = Settings(),
    progress: Progress = lambda *_: None,
) -> list[Evaluation]:
    """Evaluate each of `saes` on `documents`, spliced into `model` one at a time."""
    for sae in saes:
        model.check_widths(sae)
    batches = _batches(model, documents, settings)
    total = sum(b.n_counted for b in batches)
    with torch.no_grad():
        means, samples = _first_pass(model, saes, batches, progress, total)
        passes = [
            _Pass(model, sae, means, samples[sae.reads], settings, _context(model, settings))
            for sae in saes
        ]
        done, first = 0, 0
        for batch in batches:
            _second_pass(model, passes, batch, first, means)
            done, first = done + batch.n_counted, first + batch.ids.numel()
            progress("splicing and ablating", done, total)
    out = []
    for one in passes:
        uniform = _uniformity(model, one.sae, batches)
        out.append(one.result(uniform, settings, batches))
    return out


def _context(model: LanguageModel, settings: Settings) -> int:
    return min(settings.context, model.max_context)


def _batches(
    model: LanguageModel, documents: Sequence[Document], settings: Settings
) -> list[TokenBatch]:
    length = _context(model, settings)
    fit = _LOGIT_BYTES // (4 * length * model.config.vocab_size)
    rows = contexts(documents, model.tokenizer, length=length)
    batch = settings.batch or min(16, max(1, fit))
    found = list(pack(rows, model.tokenizer, batch=batch, tokens=settings.tokens))
    counted = sum(b.n_counted for b in found)
    if counted < 2:
        raise InputError(
            f"the text holds {counted} tokens that count (special tokens do not); "
            "give at least 2 ordinary ones"
        )
    return found


def _first_pass(
    model: LanguageModel,
    saes: Sequence[SAE],
    batches: list[TokenBatch],
    progress: Progress,
    total: int,
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    sites = sorted({s for sae in saes for s in (sae.reads, sae.writes)})
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


class _Pass:
    """What the second pass sums up for one dictionary, and for its random counterpart."""

    def __init__(self, model, sae: SAE, means, sample, settings: Settings, context: int):
        self.sae = sae
        self.mean = means[sae.writes]
        self.random = random_dictionary(
            sae, sample, means[sae.reads], means[sae.writes], seed=settings.seed
        )
        self.sums, self.random_sums = DocumentSums(SUMS), DocumentSums(SUMS)
        self.statistics = FeatureStatistics(sae.d_sae, keep=_CONTEXTS)
        self.positions = PositionProfile(context)

    def add_reconstruction(self, x, y, documents, positions, places) -> None:
        """Add counted tokens: what is read, what is to be written, and where they stand."""
        for sae, sums in ((self.sae, self.sums), (self.random, self.random_sums)):
            features = sae.encode(x)
            out = sae.decode(features, x).double()
            target = y.double()
            error = (out - target).square().sum(1)
            around = (target - self.mean).square().sum(1)
            offset = (self.mean - self.mean.mean()).square().sum()
            norms, target_norms = out.norm(dim=1), target.norm(dim=1)
            dot = (out * target).sum(1)
            sums.add(
                documents,
                n=torch.ones_like(error),
                l0=features.counts,
                error=error,
                variance=around,
                # About one scalar mean: the distance from the mean vector, and that vector's own
                # spread, which adds up exactly because deviations from the mean sum to zero.
                global_variance=around + offset,
                cosine=dot / (norms * target_norms).clamp_min(1e-30),
                norm_ratio=norms / target_norms.clamp_min(1e-30),
                written_square=norms.square(),
                written_dot=dot,
            )
            if sae is self.sae:
                self.statistics.add(features, documents, places)
                self.positions.add(positions.cpu(), error.cpu())

    def result(self, uniform: float, settings: Settings, batches: list[TokenBatch]) -> Evaluation:
        figures = formulas(self.sae.d_out)
        density = self.statistics.density
        metrics = _figures(self.sums, figures) | {
            "dead_fraction": float((density == 0).mean()),
            "dense_fraction": float((density > 0.1).mean()),
            "importance_uniformity": uniform,
        }
        variance = self.sums.ratio("variance", "n")
        return Evaluation(
            metrics=metrics,
            intervals=self.sums.intervals(figures, seed=settings.seed),
            baseline=_figures(self.random_sums, figures),
            tokens=self.statistics.tokens,
            documents=len(self.sums.table[self.sums.table.any(1)]),
            density=density_histogram(density),
            positions=self.positions.record(variance),
            statistics=self.statistics,
            batches=batches,
        )


def _figures(sums: DocumentSums, figures) -> dict[str, float]:
    totals = {name: np.asarray(sums.total(name)) for name in SUMS}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(formula(totals)) for name, formula in figures.items()}


def _second_pass(
    model: LanguageModel, passes: list[_Pass], batch: TokenBatch, first: int, means: dict
) -> None:
    counts = batch.counts.to(model.device)
    rows, positions = batch.counts.nonzero(as_tuple=True)
    documents = batch.documents[rows]
    places = first + rows * batch.ids.shape[1] + positions
    sites = sorted({s for p in passes for s in (p.sae.reads, p.sae.writes)})
    clean = model.run(batch, read=sites, logits=True)
    reference = _Losses(clean.logits, batch)
    ablated: dict[Site, dict[str, Tensor]] = {}
    for one in passes:
        sae = one.sae
        one.add_reconstruction(
            clean[sae.reads][counts], clean[sae.writes][counts], documents, positions, places
        )
        if sae.writes not in ablated:
            mean = means[sae.writes]
            ablated[sae.writes] = {
                name: reference.loss_of(
                    model.run(batch, edits=[replace(sae.writes, value)], logits=True).logits
                )
                for name, value in (("zero", torch.zeros_like(mean)), ("mean", mean))
            }
        for dictionary, sums in ((sae, one.sums), (one.random, one.random_sums)):
            logits = model.run(batch, edits=[splice(dictionary)], logits=True).logits
            sums.add(
                reference.documents,
                targets=torch.ones_like(reference.clean),
                clean=reference.clean,
                spliced=reference.loss_of(logits),
                **ablated[sae.writes],
            )
            sums.add(documents, kl=reference.divergence_of(logits))


class _Losses:
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

    def loss_of(self, logits: Tensor) -> Tensor:
        """Cross-entropy of every target `[n]`."""
        losses = [
            F.cross_entropy(some.float(), wanted, reduction="none")
            for some, wanted in zip(
                _chunks(logits[:, :-1], self.targets), self.wanted.split(_CHUNK), strict=True
            )
        ]
        return torch.cat(losses)

    def divergence_of(self, logits: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the clean run at every counted token `[n]`."""
        divergences = []
        for mine, theirs in zip(
            _chunks(self.logits, self.counts), _chunks(logits, self.counts), strict=True
        ):
            clean, other = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
            divergences.append(F.kl_div(other, clean, log_target=True, reduction="none").sum(-1))
        return torch.cat(divergences)


def _chunks(logits: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The rows of `logits` where `mask` is True, a few at a time: a vocabulary is wide."""
    rows, columns = mask.nonzero(as_tuple=True)
    for some in zip(rows.split(_CHUNK), columns.split(_CHUNK), strict=True):
        yield logits[some]


def _uniformity(model: LanguageModel, sae: SAE, batches: list[TokenBatch]) -> float:
    found, tokens = [], 0
    for batch in batches:
        found.append(importance_uniformity(model, sae, batch).cpu())
        tokens += batch.n_counted
        if tokens >= _IMPORTANCE_TOKENS:
            break
    return float(torch.cat(found).mean()) if found else float("nan")
