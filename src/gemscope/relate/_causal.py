"""Whether a predecessor causes its successor: ablate the one, watch the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.errors import InputError
from gemscope.features import Activations
from gemscope.lm import Edit, LanguageModel
from gemscope.sae import SAE, JumpReLU

from ._pairs import Indexed

_BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What ablating a feature does to a later one, over tokens on which both fire."""

    before: int
    after: int
    tokens: int
    drop: float
    """Mean of (pre-activation before - after the ablation) as a share of its mean before."""
    silenced: float
    """Share of the tokens on which the later feature falls silent."""
    control_drop: float
    """Mean drop when another feature is ablated that fires on the same tokens, over `controls`."""
    control_silenced: float
    controls: list[int]

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {name: getattr(self, name) for name in self.__slots__}


@torch.no_grad()
def ablate(
    model: LanguageModel,
    sae_before: SAE,
    sae_after: SAE,
    before: Indexed,
    after: Indexed,
    pair: tuple[int, int],
    *,
    contexts: int = 12,
    controls: int = 3,
    seed: int = 0,
) -> Ablation:
    """Take `pair[0]`'s part out of the stream wherever it fires; measure `pair[1]` downstream.

    The feature is ablated on every counted token of up to `contexts` contexts of the indexed text
    in which both fire, so effects through attention count as well. What it wrote is taken out and
    everything else, the error of the dictionary included, is left. The same is done with features
    of the same layer drawn at random among those that fire on those tokens: a drop means something
    beside theirs.
    """
    for sae in (sae_before, sae_after):
        if not isinstance(sae, SAE) or sae.is_transcoder:
            raise InputError(
                "the causal check takes a feature out of the site it is read from: it needs "
                "SAEs, not transcoders or multi-layer models"
            )
    i, j = pair
    fired = after.activations.of(after.address, j)[0]
    own = before.activations.of(before.address, i)[0]
    places = np.intersect1d(own, fired, assume_unique=True)
    if not len(places):
        raise InputError(f"features {i} and {j} fire on no token together; nothing to check")
    text = before.activations.text
    rng = np.random.default_rng(seed)
    found = np.unique(text.context_of(places))
    chosen = np.sort(rng.permutation(found)[:contexts])
    inside = np.isin(text.context_of(places), chosen)
    watched = _Watch(model, sae_before, sae_after, before.activations, chosen, j)
    others = _controls(before, chosen, places[inside], i, controls, rng)
    drop, silenced = watched.without(i, places[inside])
    beside = [watched.without(other, where) for other, where in others]
    return Ablation(
        before=i,
        after=j,
        tokens=int(inside.sum()),
        drop=drop,
        silenced=silenced,
        control_drop=float(np.mean([d for d, _ in beside])) if beside else 0.0,
        control_silenced=float(np.mean([s for _, s in beside])) if beside else 0.0,
        controls=[other for other, _ in others],
    )


def _controls(
    before: Indexed, chosen: np.ndarray, places: np.ndarray, own: int, count: int,
    rng: np.random.Generator,
) -> list[tuple[int, np.ndarray]]:  # fmt: skip
    """Other features and those of `places` they fire on: a quarter of them if there are such."""
    fires: dict[int, np.ndarray] = {}
    for first, stop, code in before.activations.codes(before.address):
        here = places[(places >= first) & (places < stop)] - first
        if len(here):
            rows = code.tocsr()[here].tocoo()
            for feature in np.unique(rows.col).tolist():
                at = here[np.unique(rows.row[rows.col == feature])] + first
                fires[feature] = np.concatenate([fires.get(feature, at[:0]), at])
    fires.pop(own, None)
    common = [f for f, at in fires.items() if len(at) >= len(places) / 4] or list(fires)
    picked = rng.permutation(sorted(common))[:count]
    return [(int(f), fires[int(f)]) for f in picked]


class _Watch:
    """The pre-activation of one feature on some contexts, with and without others."""

    def __init__(
        self, model: LanguageModel, sae_before: SAE, sae_after: SAE, activations: Activations,
        chosen: np.ndarray, feature: int,
    ):  # fmt: skip
        self.model, self.before, self.after = model, sae_before, sae_after
        self.text, self.chosen, self.feature = activations.text, chosen, feature
        self.clean = self._run(())
        activation = sae_after.activation
        threshold = activation.threshold[feature] if isinstance(activation, JumpReLU) else 0.0
        self.threshold = max(float(threshold), 0.0)

    def without(self, feature: int, places: np.ndarray) -> tuple[float, float]:
        """Drop and share silenced at `places` when a feature of the earlier layer is ablated."""
        site = self.before.reads
        values = _one_feature(self.before, feature)
        row = self.before.rows([feature])[0, 0]

        def function(x: Tensor) -> Tensor:
            return (x.float() - values(x.float())[:, None] * row).to(x.dtype)

        now = self._run((Edit(site, site, function),))
        clean = np.array([self.clean[int(p)] for p in places])
        left = np.array([now[int(p)] for p in places])
        return float((clean - left).mean() / clean.mean()), float((left <= self.threshold).mean())

    def _run(self, edits: Sequence[Edit]) -> dict[int, float]:
        """The pre-activation at every place of the chosen contexts."""
        out: dict[int, float] = {}
        site = self.after.reads
        for begin in range(0, len(self.chosen), _BATCH):
            contexts = self.chosen[begin : begin + _BATCH].tolist()
            batch = self._batch(contexts)
            x = self.model.run(batch, read=[site], edits=edits)[site]
            pre = self.after.pre_activations(x.flatten(0, 1), [self.feature])[:, 0]
            for context, row in zip(contexts, pre.reshape(x.shape[:2]).tolist(), strict=True):
                first, stop = self.text.offsets[context : context + 2].tolist()
                # What is behind the context's end is padding.
                out |= dict(zip(range(first, stop), row, strict=False))
        return out

    def _batch(self, contexts: Sequence[int]) -> TokenBatch:
        """Contexts from anywhere in the text, padded on the right."""
        rows = [self.text.batch(c, c + 1, 0) for c in contexts]
        length = max(row.ids.shape[1] for row in rows)
        ids = torch.zeros(len(rows), length, dtype=rows[0].ids.dtype)
        counts = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : row.ids.shape[1]] = row.ids[0]
            counts[i, : row.ids.shape[1]] = row.counts[0]
        where = [torch.cat([getattr(row, n) for row in rows]) for n in ("documents", "starts")]
        return TokenBatch(ids, counts, *where)


def _one_feature(sae: SAE, feature: int) -> Callable[[Tensor], Float[Tensor, " n"]]:
    """The activations of one feature, of an encoder that may choose among features."""
    if isinstance(sae.activation, JumpReLU):
        small = sae.only([feature])
        return lambda x: small.encode(x).dense()[:, 0]
    return lambda x: sae.encode(x).dense()[:, feature]
