"""Recompute a sample of what a store says from model, dictionary and text, and compare."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary

from ._pieces import vocabulary
from ._store import Store
from ._text import Text
from ._weights import decoder_vectors, logit_columns, weight_columns

TOLERANCE = 1e-3
"""Largest difference of a figure from its recomputation, as a share of the larger scale: float32
sums in another order differ by some 1e-5, other weights or another text by much more."""


@dataclass(slots=True)
class Verified:
    """How much of a dictionary was compared, and what disagrees."""

    address: str
    compared: int = 0
    """Figures."""
    worst: float = 0.0
    """Largest relative difference among those that agree."""
    disagree: list[str] = field(default_factory=list)

    def compare(self, what: str, stored: Any, found: Any, scale: float | None = None) -> None:
        """One figure or several, with what is large for them."""
        a, b = np.asarray(stored, dtype=np.float64), np.asarray(found, dtype=np.float64)
        self.compared += max(a.size, b.size)
        if a.shape != b.shape:
            self.disagree.append(f"{what}: {a.size} figures stored, {b.size} found")
            return
        if not a.size:
            return
        size = scale or max(float(np.abs(a).max()), float(np.abs(b).max()), 1e-12)
        worst = float(np.abs(a - b).max()) / size
        if worst > TOLERANCE:
            at = int(np.abs(a - b).argmax())
            self.disagree.append(f"{what}: stored {a.flat[at]:.6g}, found {b.flat[at]:.6g}")
        else:
            self.worst = max(self.worst, worst)

    def json(self) -> dict[str, Any]:
        """What `gemscope verify --json` says of it."""
        return {
            "address": self.address, "compared": self.compared, "worst": self.worst,
            "disagree": self.disagree,
        }  # fmt: skip


@torch.no_grad()
def verify(
    store: Store,
    model: LanguageModel,
    sae: Dictionary,
    address: str,
    *,
    digest: str,
    contexts: int = 16,
    features: int = 64,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Verified:
    """Compare weights' figures of some features, and activations in some contexts.

    In the sampled contexts every stored example has to be found again, each activation of it, and
    nothing may be stronger than a feature's stored maximum.
    """
    known, out = store.dictionary(address), Verified(address)
    if known["digest"] != digest:
        out.disagree.append(
            f"the dictionary's parameters: stored SHA-256 {known['digest'][:16]}, found "
            f"{digest[:16]}"
        )
    if known["d_sae"] != sae.d_sae:
        out.disagree.append(f"d_sae: stored {known['d_sae']}, found {sae.d_sae}")
        return out
    generator = np.random.default_rng(seed)
    _weights(store, model, sae, address, generator, features, out)
    text = store.text(address)
    if text.key != known["text_key"]:
        out.disagree.append("the text: its tokens are not those that were indexed")
    peaks = store.features(address, ["max"])["max"].to_numpy()
    by_context: dict[int, list[dict[str, Any]]] = {}
    for row in store.contexts(address):
        by_context.setdefault(row["context"], []).append(row)
    chosen = generator.permutation(text.n_contexts)[:contexts]
    for done, number in enumerate(sorted(int(c) for c in chosen), start=1):
        _context(model, sae, text, number, by_context.get(number, []), peaks, out)
        progress("verifying", done, len(chosen))
    return out


def _context(
    model: LanguageModel,
    sae: Dictionary,
    text: Text,
    number: int,
    rows: list[dict[str, Any]],
    peaks: np.ndarray,
    out: Verified,
) -> None:
    batch = text.batch(number, number + 1, 0)
    x = model.run(batch, read=[sae.reads])[sae.reads][0]
    dense = sae.encode(x.float()).dense().cpu().numpy()
    dense[~batch.counts[0].numpy()] = 0
    above = np.flatnonzero(dense.max(0) > peaks * (1 + TOLERANCE) + 1e-6)
    out.compared += len(peaks)
    for feature in above[:5]:
        out.disagree.append(
            f"feature {feature}: stored max {peaks[feature]:.6g}, "
            f"found {dense[:, feature].max():.6g} in context {number}"
        )
    for row in rows:
        feature, values = row["feature"], np.array(row["values"], dtype=np.float32)
        mine = dense[:, feature]
        what = f"feature {feature}, {row['group']} {row['rank']}, context {number}"
        scale = max(float(peaks[feature]), 1e-12)
        stored = np.zeros(len(mine), dtype=np.float32)
        stored[row["positions"]] = values
        # On the threshold itself a feature may fall either way.
        flipped = (stored > 0) != (mine > 0)
        if flipped.sum() <= 0.02 * max(len(values), 50):
            stored, mine = np.where(flipped, 0, stored), np.where(flipped, 0, mine)
        out.compare(what, stored, mine, scale)
        if row["group"] != "near":
            out.compare(f"{what}, peak", row["value"], dense[row["position"], feature], scale)


def _weights(
    store: Store,
    model: LanguageModel,
    sae: Dictionary,
    address: str,
    generator: np.random.Generator,
    count: int,
    out: Verified,
) -> None:
    names = ["threshold", "bias", "encoder_norm", "decoder_norm"]
    table = store.features(address, [*names, "promoted"])
    columns = weight_columns(sae)
    for name in names:
        out.compare(name, table[name].to_numpy(), columns[name])
    vectors = decoder_vectors(sae).cpu().numpy()
    out.compare("decoder rows", store.vectors(address), vectors)
    words = vocabulary(model.tokenizer)
    promoted = table["promoted"]
    for feature in sorted(int(f) for f in generator.permutation(sae.d_sae)[:count]):
        stored = promoted[feature].as_py()
        if stored is None:
            continue
        found = logit_columns(model, sae, feature, feature + 1, words, count=len(stored))
        logits = [t["logit"] for t in found["promoted"][0]]
        out.compare(f"feature {feature}, promoted", [t["logit"] for t in stored], logits)
