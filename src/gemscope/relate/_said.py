"""What is said of features beside their numbers: contexts, promoted tokens, explanations."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gemscope.errors import InputError
from gemscope.features import Activations, Source, collect, shown, token_pieces
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, Dictionary
from gemscope.sites import Sites

from ._compare import Comparison, compare
from ._counts import source_documents
from ._peaks import Peak, peaks


@dataclass(frozen=True, slots=True)
class Said:
    """Words for a feature."""

    promoted: list[str]
    """Tokens whose logits it raises most, if what it writes can be read so."""
    explanation: str | None
    """The one with the best score in the store, if a store was given and has one."""
    contexts: dict[str, list[Peak]] = field(default_factory=dict)
    """Its strongest tokens in each text."""

    def line(self, name: str) -> str:
        """The explanation; else the strongest token in the text called `name`."""
        if self.explanation:
            return self.explanation
        found = self.contexts.get(name) or []
        return re.sub(r" {2,}", " ", shown(str(found[0]))).strip() if found else ""

    def flat(self) -> dict[str, str]:
        """One string for each column of a table."""
        return {
            "explanation": self.explanation or "",
            "promoted": " ".join(shown(t).strip() for t in self.promoted),
        } | {f"context in {n}": shown(str(p[0])) for n, p in self.contexts.items() if p}

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "explanation": self.explanation,
            "promoted": self.promoted,
            "contexts": {n: [one.json() for one in p] for n, p in self.contexts.items()},
        }


@contextmanager
def collected(
    model: LanguageModel,
    sae: Dictionary,
    sides: Sequence[Source],
    keep: Path | None,
    *,
    address: str,
    tokens: int,
    **options: Any,
) -> Iterator[Activations]:
    """Activations on all sides, up to `tokens` of each, in one pass; gone after unless kept."""
    if tokens < 1:
        raise InputError(f"{tokens} tokens are none; take 1 or more")
    options |= {"addresses": [address], "tokens": tokens * len(sides)}
    if keep is not None:
        yield collect(model, [sae], sides, keep, **options)
        return
    with TemporaryDirectory(prefix="gemscope-compare-") as folder:
        yield collect(model, [sae], sides, Path(folder) / "activations", **options)


def compare_sides(
    activations: Activations, address: str, sides: Sequence[Source]
) -> list[Comparison]:
    """The first of `sides` against each of the others."""
    names = [side.name for side in sides]
    return [compare(activations, address, names[0], name) for name in names[1:]]


def say(
    model: LanguageModel,
    sae: Dictionary,
    activations: Activations,
    address: str,
    features: Sequence[int],
    comparisons: Sequence[Comparison],
    store: Any = None,
) -> dict[int, Said]:
    """Words for `features`; explanations from `store`, a `gemscope.features.Store`, if given."""
    names = list(dict.fromkeys(side.name for one in comparisons for side in (one.a, one.b)))
    documents = {name: source_documents(activations.text, name) for name in names}
    known = _explanations(store, address)
    return {
        feature: Said(
            promoted(model, sae, feature),
            known.get(feature),
            {
                name: peaks(activations, address, feature, model.tokenizer, documents=rows)
                for name, rows in documents.items()
            },
        )
        for feature in dict.fromkeys(features)
    }


def promoted(model: LanguageModel, sae: Dictionary, feature: int, count: int = 5) -> list[str]:
    """The tokens whose logits a feature raises most; none where its space is not the stream's."""
    rows = sae.rows([feature])[0]  # [n_writes, d_out]
    site = sae.writes[-1] if isinstance(sae.writes, Sites) else sae.writes
    row = rows[:1] if isinstance(sae, SAE) else rows.sum(0, keepdim=True)
    logits = model.direct_logits(row.to(model.device), site)
    if logits is None:
        return []
    ids = logits[0].topk(count).indices.tolist()
    return [token_pieces(model.tokenizer, [token])[0] for token in ids]


def comparison_json(
    comparisons: Sequence[Comparison], said: dict[int, Said] | None = None
) -> list[dict[str, Any]]:
    """Every row of every comparison, from most for a to most for b.

    Of several comparisons each row says which `b` it is of. With `said`, rows are full, and those
    of features in it have its words.
    """
    out = []
    for one in comparisons:
        for row in one.rows(full=said is not None):
            if len(comparisons) > 1:
                row["b"] = one.b.name
            if said is not None and row["feature"] in said:
                row |= said[row["feature"]].json()
            out.append(row)
    return out


def _explanations(store: Any, address: str) -> dict[int, str]:
    """The best-scored explanation of each feature that has one."""
    if store is None:
        return {}
    best: dict[int, tuple[float, str]] = {}
    for one in store.explanations(address):
        score = -1.0 if one.score is None else float(one.score)
        if one.feature not in best or score > best[one.feature][0]:
            best[one.feature] = (score, one.text)
    return {feature: text for feature, (_, text) in best.items()}
