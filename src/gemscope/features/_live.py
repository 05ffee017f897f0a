"""Finding features by what fires on a given text, in several dictionaries at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary

from ._pieces import token_pieces
from ._search import Among, Found, _best, _runs
from ._store import Store

if TYPE_CHECKING:
    import numpy as np


@torch.no_grad()
def search_text(
    store: Store,
    model: LanguageModel,
    saes: Sequence[tuple[str, Dictionary]],
    text: str,
    among: Among = Among(),
    *,
    max_density: float = 0.01,
) -> list[Found]:
    """Features that fire on `text`, in all of the dictionaries at once.

    The score is a feature's strongest activation on the text as a share of its maximum in the
    store, so that dictionaries of different scales can stand in one list. Features that fire on
    more than `max_density` of the indexed tokens are left out.
    """
    if not 0 < max_density <= 1:
        raise InputError(f"a density of {max_density} is none; take one above 0 and at most 1")
    runs = _runs(store, among)
    run = model.run(text, read=[sae.reads for _, sae in saes])
    counts = run.tokens.counts[0]
    pieces = token_pieces(model.tokenizer, run.tokens.ids[0].tolist())
    scores: dict[tuple[str, int], float] = {}
    matched: dict[tuple[str, int], dict[str, Any]] = {}
    for address, sae in saes:
        table = store.features(address, ["density", "max"])
        density, peak = (table[n].to_numpy() for n in ("density", "max"))
        places = counts.nonzero()[:, 0].tolist()
        code = sae.encode(run[sae.reads][0][counts.to(model.device)].float())
        rows, features = code.rows.tolist(), code.indices.tolist()
        for row, feature, value in zip(rows, features, code.values.tolist(), strict=True):
            if density[feature] > max_density:
                continue
            share = _share(value, peak, feature)
            if share > scores.get((address, feature), 0.0):
                scores[address, feature] = share
                place = places[row]
                matched[address, feature] = {
                    "value": value, "position": place, "token": pieces[place]
                }  # fmt: skip
    return _best(store, scores, among, runs, matched=matched)


def _share(value: float, peak: "np.ndarray", feature: int) -> float:
    # One that never fired in the store has no scale: its first firing is as strong as any.
    return value / float(peak[feature]) if peak[feature] > 0 else 1.0
