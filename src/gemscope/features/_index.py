"""Index dictionaries: collect their activations, measure every feature, file it in the store."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemscope import __version__
from gemscope.activations import stop_signals
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary

from ._activations import Activations, write_text_arrays
from ._collect import Progress, Stopped, collect
from ._contexts import GROUPS
from ._pieces import bare, vocabulary
from ._records import now
from ._statistics import Keep, Measurer
from ._store import Store, quoted
from ._tables import CONTEXTS, FEATURES, vector_schema
from ._text import Source
from ._together import pair_counts, together
from ._weights import decoder_vectors, logit_columns, neighbours, weight_columns

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

_BLOCK = 512
"""Features measured at once, at most."""
_ENTRIES = 2**24
"""Activations measured at once, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to index; written beside the figures."""

    tokens: int | None = 200_000
    """Counted tokens at most; None takes the whole text."""
    context: int = 256
    """Tokens of a context, BOS included."""
    seed: int = 0
    lowered: float = 0.75
    """Share of a threshold down to which a pre-activation is a near miss."""
    keep: Keep = Keep()
    keep_activations: bool = False

    def __post_init__(self):
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"{self.tokens} tokens are none; take 1 or more")
        if self.context < 2:
            raise InputError(
                f"a context of {self.context} tokens has no room after BOS; take 2 or more"
            )
        if not 0 < self.lowered <= 1:
            raise InputError(f"thresholds cannot be lowered to {self.lowered} of them; 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed} is not between 0 and {2**32 - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A dictionary to index, and what is known of it."""

    address: str
    sae: Dictionary
    digest: str
    nominal_l0: float | None


def index(
    model: LanguageModel,
    subjects: Sequence[Subject],
    sources: Sequence[Source],
    store: Store,
    settings: Settings = Settings(),
    *,
    model_name: str,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Index `subjects` on `sources` into `store`; what the store then knows of each.

    One pass of the model serves all of them. Stopped in any way and run again with the same
    arguments, it goes on; a dictionary that was indexed before is replaced when the new rows are
    all there. `model_name` is what loads the model again.
    """
    if not subjects:
        raise InputError("no dictionary was given to index")
    key = _key(model, subjects, sources, settings)
    done = {d["address"]: d for d in store.dictionaries()}
    runs = {s.address: _hash(key, s.address) for s in subjects}
    folder = store.folder / "activations" / key
    left = [s for s in subjects if done.get(s.address, {}).get("run") != runs[s.address]]
    lacking = settings.keep_activations and not (folder / "index.json").is_file()
    if left or lacking:
        activations = collect(
            model, [s.sae for s in subjects], sources, folder, tokens=settings.tokens,
            context=settings.context, seed=settings.seed, lowered=settings.lowered,
            addresses=[s.address for s in subjects], progress=progress,
        )  # fmt: skip
        _keep_text(store, activations)
        total, words = sum(s.sae.d_sae for s in left), vocabulary(model.tokenizer)
        with stop_signals() as received:
            before = 0
            for subject in left:
                facts = _facts(model, subject, activations, settings) | {
                    "loaded_model": model_name, "collected": key,
                }  # fmt: skip
                report = _counting(progress, before, total, received)
                _write(model, subject, activations, store, settings, facts,
                       runs[subject.address], words, report)  # fmt: skip
                before += subject.sae.d_sae
    if not settings.keep_activations:
        shutil.rmtree(folder, ignore_errors=True)
    if left:
        store.refresh()
    return [store.dictionary(s.address) for s in subjects]


def _counting(
    progress: Progress, before: int, total: int, received: list[int]
) -> Callable[[int], None]:
    def report(done: int) -> None:
        progress("measuring features", before + done, total)
        if received:
            raise Stopped(
                "stopped while measuring; run the command again, and it goes on", received[0]
            )

    return report


def _key(
    model: LanguageModel,
    subjects: Sequence[Subject],
    sources: Sequence[Source],
    settings: Settings,
) -> str:
    """A name for everything the figures depend on."""
    found = hashlib.sha256()
    for part in (
        __version__, model.name, str(model.dtype), settings.tokens, settings.context,
        settings.seed, settings.lowered, settings.keep,
        *((s.address, s.digest) for s in subjects),
    ):  # fmt: skip
        found.update(f"{part}\0".encode())
    for source in sources:
        found.update(f"{source.name}\0".encode())
        for document in source.documents:
            found.update(f"{document.path}\0{len(document.text)}\0".encode())
            found.update(document.text.encode("utf-8", "replace"))
    return found.hexdigest()[:16]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _keep_text(store: Store, activations: Activations) -> None:
    folder = store.folder / "texts" / activations.text.key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_text_arrays(folder, activations.text)


def _facts(
    model: LanguageModel, subject: Subject, activations: Activations, settings: Settings
) -> dict[str, Any]:
    sae, text = subject.sae, activations.text
    documents = np.bincount(text.source, minlength=len(text.sources))
    return {
        "address": subject.address, "kind": sae.kind, "model": model.name or sae.origin.model,
        "reads": str(sae.reads), "writes": str(sae.writes), "d_in": sae.d_in, "d_out": sae.d_out,
        "d_sae": sae.d_sae, "nominal_l0": subject.nominal_l0, "digest": subject.digest,
        "tokens": text.n_tokens, "documents": len(text.paths), "contexts": text.n_contexts,
        "context_length": settings.context,
        "sources": [
            {"name": name, "tokens": int(tokens), "documents": int(count)}
            for name, tokens, count in zip(
                text.sources, text.tokens_of_sources, documents, strict=True
            )
        ],
        "text_key": text.key, "seed": settings.seed, "lowered": settings.lowered,
        "dtype": str(model.dtype).removeprefix("torch."), "bos": "in the input, in no statistic",
        "version": __version__,
    }  # fmt: skip


def _write(
    model: LanguageModel,
    subject: Subject,
    activations: Activations,
    store: Store,
    settings: Settings,
    facts: dict[str, Any],
    run: str,
    words: Sequence[str],
    report: Callable[[int], None],
) -> None:
    """All rows of one dictionary, then the one that puts them in force."""
    sae, text = subject.sae, activations.text
    measurer = Measurer(text, words, keep=settings.keep, seed=settings.seed)
    vectors = decoder_vectors(sae)
    names = (f"vectors_{sae.d_out}", "features", "contexts")
    store.table_of(names[0], vector_schema(sae.d_out))
    for name in names:  # what a run that was killed may have left
        store.table(name).delete(f"run = {quoted(run)}")
    weights, counts = weight_columns(sae), _counts(activations, subject.address, sae.d_sae)
    pairs = _pairs(activations, subject.address, counts, text.n_tokens, settings.keep.together)
    for first, stop in _blocks(counts):
        entries = activations.entries(subject.address, first, stop)
        block = measurer.block(entries, activations.near(subject.address, first, stop))
        columns = block.columns | {n: c[first:stop] for n, c in weights.items()}
        columns |= logit_columns(model, sae, first, stop, words, count=settings.keep.tokens)
        with torch.no_grad():
            columns["neighbours"] = neighbours(vectors, first, stop, settings.keep.neighbours)
        columns["together"] = [next(pairs) for _ in range(first, stop)]
        keys = _keys(run, subject.address, range(first, stop))
        store.table("features").add(_features(keys, columns))
        store.table("contexts").add(_contexts(run, subject.address, first, block.contexts, columns))
        store.table(names[0]).add(_vectors(keys, vectors[first:stop], sae.d_out))
        report(stop)
    facts |= {"created": now(), "l0": float(counts.sum() / text.n_tokens)}
    store.commit(subject.address, run, sae.d_sae, facts, names)


def _counts(activations: Activations, address: str, d_sae: int) -> np.ndarray:
    counts = np.zeros(d_sae, dtype=np.int64)
    for _, _, code in activations.codes(address):
        counts += np.diff(code.indptr)
    return counts


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Features in blocks that bound both their number and that of their activations."""
    out, first, held = [], 0, 0
    for feature, count in enumerate(counts.tolist()):
        if feature > first and (feature - first >= _BLOCK or held + count > _ENTRIES):
            out.append((first, feature))
            first, held = feature, 0
        held += count
    return [*out, (first, len(counts))]


def _pairs(
    activations: Activations, address: str, counts: np.ndarray, tokens: int, keep: int
) -> Any:
    for first, stop, both in pair_counts(activations, address):
        step = max(1, _ENTRIES // (4 * len(counts)))
        for low in range(first, stop, step):
            high = min(stop, low + step)
            yield from together(
                both[low - first : high - first], counts[low:high], counts, low, tokens, keep
            )


def _keys(run: str, address: str, features: range) -> dict[str, list]:
    n = len(features)
    return {"run": [run] * n, "dictionary": [address] * n, "feature": list(features)}


def _features(keys: Mapping[str, list], columns: dict[str, list]) -> "pa.Table":
    import pyarrow as pa

    on = [[t["token"] for t in tokens] for tokens in columns["tokens"]]
    promoted = [[t["token"] for t in tokens or []] for tokens in columns["promoted"]]
    words = [" ".join([*a, *b]) for a, b in zip(on, promoted, strict=True)]
    promotes = [sorted({bare(token) for token in tokens}) for tokens in promoted]
    found = {"words": words, "promotes": promotes, "output_score": [None] * len(words)}
    return pa.table({**keys, **columns, **found}, FEATURES)


def _contexts(
    run: str, address: str, first: int, found: Mapping[str, Any], columns: dict[str, list]
) -> "pa.Table":
    import pyarrow as pa

    n, ends = len(found["feature"]), pa.array(found["ends"], pa.int32())
    shares: list[float | None] = []
    for feature, group in zip(found["feature"].tolist(), found["group"].tolist(), strict=True):
        here = columns["intervals"][feature]
        shares.append(here[group - 1]["share"] if 1 <= group <= len(here) else None)
    return pa.table(
        {
            "run": [run] * n,
            "dictionary": [address] * n,
            "feature": found["feature"] + first,
            "group": [GROUPS[g] for g in found["group"]],
            **{name: found[name] for name in ("rank", "value", "place", "context", "position")},
            "share": shares,
            "positions": pa.ListArray.from_arrays(ends, pa.array(found["positions"], pa.int32())),
            "values": pa.ListArray.from_arrays(ends, pa.array(found["values"], pa.float32())),
        },
        CONTEXTS,
    )


def _vectors(keys: Mapping[str, list], vectors: torch.Tensor, width: int) -> "pa.Table":
    import pyarrow as pa

    flat = pa.array(vectors.contiguous().cpu().numpy().reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.table({**keys, "vector": rows}, vector_schema(width))
