"""The features a report shows: what they fire on and what they promote."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemscope.corpus import Document, TokenBatch
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, Dictionary
from gemscope.sites import each

from ._pass import Evaluation

_BEFORE, _AFTER = 12, 6
_PROMOTED = 8


@dataclass(frozen=True, slots=True)
class ContextRecord:
    """A stretch of text around a peak, with the feature's activation on each token."""

    document: str
    tokens: list[str]
    values: list[float]


@dataclass(frozen=True, slots=True)
class FeatureRecord:
    """One feature as a report shows it."""

    feature: int
    density: float
    mean: float
    """Mean activation over all counted tokens."""
    maximum: float
    promoted: list[str] | None
    """Tokens whose logits its direction raises most, highest first; None where it has none."""
    contexts: list[ContextRecord]


def top_features(
    model: LanguageModel,
    sae: Dictionary,
    evaluation: Evaluation,
    documents: Sequence[Document],
    *,
    count: int = 8,
) -> dict[str, list[FeatureRecord]]:
    """The features highest in density, and in mean activation; and some of middling density.

    The strongest features of a dictionary are often its least telling ones, so the middle of the
    density range is shown too.
    """
    statistics = evaluation.statistics
    alive = np.flatnonzero(statistics.fired)
    by_density: list[int] = alive[np.argsort(-statistics.density[alive], kind="stable")].tolist()
    by_mean: list[int] = alive[np.argsort(-statistics.mean[alive], kind="stable")].tolist()
    # Enough firings for three documents, and rare enough to mean something in particular.
    telling = [f for f in by_density if len(statistics.contexts(f)) == statistics.keep]
    telling = telling or by_density
    spread = np.linspace(0.2, 0.8, count) * (len(telling) - 1)
    middle = list(dict.fromkeys(telling[int(i)] for i in spread)) if telling else []
    groups = {"density": by_density[:count], "mean": by_mean[:count], "middle": middle}
    chosen = sorted({f for group in groups.values() for f in group})
    contexts = _contexts(model, sae, evaluation, chosen, documents)
    promoted = _promoted(model, sae, chosen)
    records = {
        f: FeatureRecord(
            f,
            float(statistics.density[f]),
            float(statistics.mean[f]),
            float(statistics.peaks[f]),
            promoted[f] if promoted else None,
            contexts[f],
        )
        for f in chosen
    }
    return {name: [records[f] for f in group] for name, group in groups.items()}


def _promoted(
    model: LanguageModel, sae: Dictionary, chosen: list[int]
) -> dict[int, list[str]] | None:
    if not chosen:
        return {}
    with torch.no_grad():
        logits = model.direct_logits(_directions(sae, chosen), each(sae.writes)[-1])
    if logits is None:
        return None
    best = logits.topk(min(_PROMOTED, logits.shape[1]), dim=1).indices.tolist()
    return {
        f: [model.tokenizer.decode([i]) for i in ids] for f, ids in zip(chosen, best, strict=True)
    }


def _directions(sae: Dictionary, chosen: list[int]) -> Tensor:
    """What each feature adds to the last residual stream it reaches, other layers aside."""
    rows = sae.rows(chosen)
    # Layers of a crosscoder reconstruct one stream each, of a transcoder they add to one.
    adds = isinstance(sae, SAE) or sae.is_transcoder
    return rows.sum(1) if adds else rows[:, -1]


def _contexts(
    model: LanguageModel,
    sae: Dictionary,
    evaluation: Evaluation,
    chosen: list[int],
    documents: Sequence[Document],
) -> dict[int, list[ContextRecord]]:
    """Windows around the peaks of `chosen`, each read from the model once more."""
    found: dict[int, list[ContextRecord]] = {f: [] for f in chosen}
    starts = np.cumsum([0] + [b.ids.numel() for b in evaluation.batches])
    wanted: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for f in chosen:
        for rank, (place, _) in enumerate(evaluation.statistics.contexts(f)):
            batch = int(np.searchsorted(starts, place, side="right")) - 1
            row, column = divmod(place - int(starts[batch]), evaluation.batches[batch].ids.shape[1])
            wanted.setdefault((batch, row), []).append((f, rank, column))
    ranked: dict[int, dict[int, ContextRecord]] = {f: {} for f in chosen}
    for (number, row), peaks in sorted(wanted.items()):
        source = evaluation.batches[number]
        one = TokenBatch(*(getattr(source, n)[row : row + 1] for n in TokenBatch.__slots__))
        with torch.no_grad():
            x = model.run(one, read=[sae.reads])[sae.reads][0]
            dense = sae.encode(x)
        rows, indices, values = dense.rows, dense.indices, dense.values
        ids = one.ids[0].tolist()
        for f, rank, column in peaks:
            line = torch.zeros(len(ids), device=values.device)
            mine = indices == f
            line[rows[mine]] = values[mine]
            line[0] = 0  # BOS is shown, and counts nowhere
            window = slice(max(0, column - _BEFORE), column + _AFTER + 1)
            ranked[f][rank] = ContextRecord(
                documents[int(one.documents[0])].path,
                [model.tokenizer.decode([i]) for i in ids[window]],
                [round(v, 4) for v in line.tolist()[window]],
            )
    for f, by_rank in ranked.items():
        found[f] = [by_rank[rank] for rank in sorted(by_rank)]
    return found
