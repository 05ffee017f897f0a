"""What a dictionary's weights say of its features, without any text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.lm import LanguageModel
from gemscope.sae import SAE, CrossLayer, Dictionary
from gemscope.sites import each

from ._encoding import thresholds

if TYPE_CHECKING:
    import numpy as np

_LOGIT_BINS = 50


def decoder_vectors(sae: Dictionary) -> Float[Tensor, "d_sae d_out"]:
    """The decoder row of each feature in float32; of several layers, what it writes to the layer
    it is read in.
    """
    if isinstance(sae, SAE):
        return sae.w_dec.float()
    return torch.cat([layer.w_dec[:, place].float() for place, layer in enumerate(sae.layers)])


def encoder_vectors(sae: Dictionary) -> Float[Tensor, "d_sae d_in"]:
    """The encoder column of each feature in float32."""
    if isinstance(sae, SAE):
        return sae.w_enc.float().T
    return torch.cat([layer.w_enc.float().T for layer in sae.layers])


def layers(sae: Dictionary) -> list[int]:
    """The layer that each feature is read in."""
    if isinstance(sae, SAE):
        return [each(sae.reads)[0].layer] * sae.d_sae
    counts = [layer.w_enc.shape[1] for layer in sae.layers]
    return [s.layer for s, n in zip(each(sae.reads), counts, strict=True) for _ in range(n)]


def weight_columns(sae: Dictionary) -> dict[str, list]:
    """Norms, thresholds and biases, one of each feature."""
    encoder, decoder = encoder_vectors(sae), decoder_vectors(sae)
    bias = sae.b_enc if isinstance(sae, SAE) else torch.cat([x.b_enc for x in sae.layers])
    cosine: list[float | None] = [None] * sae.d_sae
    if encoder.shape == decoder.shape:
        cosine = torch.cosine_similarity(encoder, decoder, dim=1, eps=1e-30).tolist()
    whole = decoder if isinstance(sae, SAE) else _all_layers(sae)
    return {
        "layer": layers(sae),
        "threshold": thresholds(sae).tolist(),
        "bias": bias.float().tolist(),
        "encoder_norm": encoder.norm(dim=1).tolist(),
        "decoder_norm": whole.norm(dim=1).tolist(),
        "encoder_decoder_cosine": cosine,
    }


def _all_layers(sae: CrossLayer) -> Tensor:
    """Everything a feature writes, layer after layer, for its norm alone."""
    parts = []
    for place, layer in enumerate(sae.layers):
        rows = layer.w_dec.float().clone()
        rows[:, :place] = 0
        parts.append(rows.flatten(1))
    return torch.cat(parts)


def logit_columns(
    model: LanguageModel,
    sae: Dictionary,
    first: int,
    stop: int,
    vocabulary: Sequence[str],
    *,
    count: int,
) -> dict[str, list]:
    """Promoted and suppressed tokens of some features, and the spread of their direct logits."""
    logits = direct_logits(model, sae, first, stop)
    if logits is None:
        names = ("promoted", "suppressed", "logit_histogram", "logit_mean", "logit_std",
                 "logit_skew", "logit_kurtosis")  # fmt: skip
        return {name: [None] * (stop - first) for name in names}
    size = min(len(vocabulary), logits.shape[1])
    logits = logits[:, :size]  # rows that pad the embedding are no tokens
    k = min(count, size)
    mean = logits.mean(1, keepdim=True)
    around = (logits - mean).double()
    variance = around.square().mean(1)
    std = variance.sqrt().clamp_min(1e-30)
    return {
        "promoted": _named(*logits.topk(k, dim=1), vocabulary),
        "suppressed": _named(*logits.topk(k, dim=1, largest=False), vocabulary),
        "logit_histogram": [_histogram(row.cpu().numpy()) for row in logits],
        "logit_mean": mean[:, 0].tolist(),
        "logit_std": variance.sqrt().tolist(),
        "logit_skew": (around.pow(3).mean(1) / std.pow(3)).tolist(),
        "logit_kurtosis": (around.pow(4).mean(1) / std.pow(4)).tolist(),
    }


@torch.no_grad()
def direct_logits(
    model: LanguageModel, sae: Dictionary, first: int, stop: int
) -> Float[Tensor, "n_features vocab"] | None:
    """What features add to the logits directly, final norm's gain folded in; None where what they
    write does not lie in the residual stream's space.
    """
    rows = sae.rows(range(first, stop))
    # Layers of a crosscoder reconstruct one stream each, of a transcoder they add to one.
    adds = isinstance(sae, SAE) or sae.is_transcoder
    return model.direct_logits(rows.sum(1) if adds else rows[:, -1], each(sae.writes)[-1])


def _named(values: Tensor, indices: Tensor, vocabulary: Sequence[str]) -> list[list[dict]]:
    return [
        [{"token": vocabulary[i], "id": i, "logit": v} for v, i in zip(vs, ids, strict=True)]
        for vs, ids in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _histogram(row: "np.ndarray") -> dict:
    import numpy as np

    low, high = float(row.min()), float(row.max())
    if not high > low:
        return {"low": low, "high": high, "counts": [len(row)]}
    counts, _ = np.histogram(row, _LOGIT_BINS, (low, high))
    return {"low": low, "high": high, "counts": counts.tolist()}


def neighbours(vectors: Float[Tensor, "d_sae d_out"], first: int, stop: int, count: int) -> list:
    """The features nearest to each of some by the cosine of their decoder rows."""
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosine = unit[first:stop] @ unit.T
    cosine[torch.arange(stop - first), torch.arange(first, stop)] = -torch.inf
    best = cosine.topk(min(count, len(vectors) - 1), dim=1)
    return [
        [{"feature": i, "cosine": v} for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
