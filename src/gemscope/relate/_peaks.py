"""Where a feature fires most strongly, in words."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemscope.features import Activations, token_pieces


@dataclass(frozen=True, slots=True)
class Peak:
    """The strongest token of a feature in a document, with the text about it."""

    before: str
    token: str
    after: str
    value: float
    path: str

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {n: getattr(self, n) for n in ("before", "token", "after", "value", "path")}

    def __str__(self) -> str:
        return f"{self.before}«{self.token}»{self.after}"


def peaks(
    activations: Activations,
    address: str,
    feature: int,
    tokenizer: Any,
    *,
    documents: np.ndarray | None = None,
    count: int = 3,
    before: int = 8,
    after: int = 4,
) -> list[Peak]:
    """The strongest tokens of a feature, one a document, of `documents` or of all."""
    text = activations.text
    places, values = activations.of(address, feature)
    of = text.document_of(places)
    if documents is not None:
        keep = np.isin(of, documents)
        places, values, of = places[keep], values[keep], of[keep]
    order = np.lexsort((places, -values))
    _, first = np.unique(of[order], return_index=True)
    found = []
    for i in order[np.sort(first)][:count]:
        context = int(text.context_of(places[i : i + 1])[0])
        begin, end = int(text.offsets[context]), int(text.offsets[context + 1])
        place = int(places[i])
        low, high = max(begin + 1, place - before), min(end, place + after + 1)
        pieces = token_pieces(tokenizer, text.ids[low:high].tolist())
        here = place - low
        found.append(
            Peak(
                "".join(pieces[:here]),
                pieces[here],
                "".join(pieces[here + 1 :]),
                float(values[i]),
                text.paths[int(of[i])],
            )
        )
    return found
