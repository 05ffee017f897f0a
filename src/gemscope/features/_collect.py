"""One pass of the model over a text: every activation of some dictionaries, filed by feature.

The text is chosen and stored first; then contexts go through the model a batch at a time and every
dictionary encodes what it reads. A shard of contexts is written whole or not at all, so a pass that
was ended in any way goes on with the first shard that is missing.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemscope import __version__
from gemscope.activations import stop_signals, write_whole
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary, SparseFeatures

from ._activations import (
    VERSION,
    Activations,
    read_json,
    read_text_arrays,
    write_tensors,
    write_text_arrays,
)
from ._encoding import WithNearMisses
from ._near import nearest_misses
from ._text import Source, Text, sample_text

Progress = Callable[[str, int, int], None]
"""Called with what is being done, tokens done and tokens in all."""

_SHARD_BYTES = 2**28
"""Of activations held in memory before a shard is written."""
_MOST_PLACES = 2**16
_BATCH_TOKENS = 8_192
_ENTRY = 8
"""Bytes of an activation: a place and a value."""


class Stopped(Exception):  # noqa: N818
    """A signal came; what was done is kept, and the same call goes on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pass will need, at most about."""

    memory: int
    """Bytes beside model and dictionaries."""
    disk: int
    """Bytes of the activations of `tokens` tokens."""


def estimate(saes: Sequence[Dictionary], tokens: int) -> Estimate:
    """What collecting `tokens` tokens will need, by the dictionaries' nominal L0s."""
    per_token = sum(_ENTRY * (sae.origin.l0 or 0.02 * sae.d_sae) for sae in saes)
    widest = max(sae.d_sae for sae in saes)
    batch = 4 * _BATCH_TOKENS * sum(sae.d_in for sae in saes)
    return Estimate(int(3 * _SHARD_BYTES + batch + 64 * widest), int(per_token * tokens))


def collect(
    model: LanguageModel,
    saes: Sequence[Dictionary],
    sources: Sequence[Source],
    folder: Path,
    *,
    tokens: int | None = None,
    context: int = 256,
    seed: int = 0,
    lowered: float = 0.75,
    addresses: Sequence[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Activations:
    """Collect every activation of `saes` on `tokens` counted tokens of `sources` into `folder`.

    Run again with the same arguments, it goes on where it was stopped; with others, it refuses.
    Near misses are pre-activations between `lowered` times the threshold and the threshold.
    Memory beside the model is bounded (`estimate`); raises `Stopped` on Ctrl-C or SIGTERM.
    """
    folder = Path(folder)
    names = list(
        addresses or [sae.origin.address or f"dictionary {i}" for i, sae in enumerate(saes)]
    )
    if len(set(names)) != len(names):
        raise InputError("a dictionary was given twice; give each once")
    if not 0 < lowered <= 1:
        raise InputError(f"thresholds cannot be lowered to {lowered} of themselves: 0 to 1")
    for sae in saes:
        model.check_widths(sae)
    length = min(context, model.max_context)
    text = sample_text(
        sources, model.tokenizer, tokens=tokens, context=length, prefix=model.prefix, seed=seed
    )
    plan = {
        "version": VERSION, "gemscope": __version__, "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."), "addresses": names,
        "d_sae": [sae.d_sae for sae in saes], "text": text.key, "context": length, "seed": seed,
        "lowered": lowered, "borders": _borders(text, saes),
    }  # fmt: skip
    if (folder / "index.json").is_file() and _same(read_json(folder / "index.json"), plan):
        return Activations.open(folder)
    _begin(folder, plan, text)
    _shards(model, saes, read_text_arrays(folder), folder, plan, progress)
    write_whole(folder / "index.json", json.dumps(plan).encode())
    return Activations.open(folder)


def _borders(text: Text, saes: Sequence[Dictionary]) -> list[int]:
    """First contexts of the shards, and the number of contexts."""
    per_token = sum(2 * _ENTRY * (sae.origin.l0 or 0.02 * sae.d_sae) for sae in saes)
    room = max(1_024, min(_MOST_PLACES, int(_SHARD_BYTES / per_token)))
    borders = [0]
    for context in range(1, text.n_contexts + 1):
        if text.offsets[context] - text.offsets[borders[-1]] >= room or context == text.n_contexts:
            borders.append(context)
    return borders


def _same(found: dict[str, Any] | None, plan: dict[str, Any]) -> bool:
    return found is not None and found == json.loads(json.dumps(plan))


def _begin(folder: Path, plan: dict[str, Any], text: Text) -> None:
    found = read_json(folder / "plan.json")
    if _same(found, plan):
        return
    if found is not None:
        keys = [k for k in plan if found.get(k) != json.loads(json.dumps(plan[k]))]
        raise InputError(
            f"{folder} holds activations collected with other settings ({', '.join(keys)}); "
            "repeat those, or delete the folder"
        )
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else; name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_arrays(folder, text)
    write_whole(folder / "plan.json", json.dumps(plan).encode())


def _shards(
    model: LanguageModel,
    saes: Sequence[Dictionary],
    text: Text,
    folder: Path,
    plan: dict[str, Any],
    progress: Progress,
) -> None:
    both = [WithNearMisses(sae, plan["lowered"]) for sae in saes]
    counted = np.concatenate(([0], np.cumsum(text.counts)))
    borders = plan["borders"]
    with stop_signals() as received, torch.no_grad():
        for shard, (first, stop) in enumerate(pairwise(borders)):
            file = folder / f"{shard:06d}.safetensors"
            if file.is_file():
                continue
            held: list[list[tuple]] = [[] for _ in saes]
            for begin, end in _batches(text, first, stop):
                if received:
                    raise Stopped(
                        f"stopped at {counted[text.offsets[first]]:,} of {text.n_tokens:,} tokens; "
                        "run the command again, and it goes on",
                        received[0],
                    )
                _encode(model, both, text, begin, end, held)
                progress("indexing", int(counted[text.offsets[end]]), text.n_tokens)
            tensors: dict[str, np.ndarray] = {}
            for number, parts in enumerate(held):
                tensors |= _filed(parts, text, first, stop, saes[number].d_sae, f"{number}.")
            _write(file, tensors)


def _batches(text: Text, first: int, stop: int) -> list[tuple[int, int]]:
    """Contexts first to stop in batches of about `_BATCH_TOKENS` padded tokens."""
    out, begin, widest = [], first, 0
    widths = np.diff(text.offsets)
    for context in range(first, stop):
        widest = max(widest, int(widths[context]))
        if context > begin and widest * (context + 1 - begin) > _BATCH_TOKENS:
            out.append((begin, context))
            begin, widest = context, int(widths[context])
    return [*out, (begin, stop)]


def _encode(
    model: LanguageModel,
    both: list[WithNearMisses],
    text: Text,
    begin: int,
    end: int,
    held: list[list[tuple]],
) -> None:
    pad = model.tokenizer.pad_token_id
    batch = text.batch(begin, end, 0 if pad is None else pad)
    run = model.run(batch, read=[one.sae.reads for one in both])
    counts = batch.counts.to(model.device)
    rows, columns = batch.counts.nonzero(as_tuple=True)
    places = text.offsets[begin + rows.numpy()] + columns.numpy()
    for one, parts in zip(both, held, strict=True):
        fires, wide = one.encode(run[one.sae.reads][counts].float())
        parts.append((places, _arrays(fires), None if wide is None else _arrays(wide)))


def _arrays(code: SparseFeatures) -> tuple[np.ndarray, ...]:
    return tuple(x.cpu().numpy() for x in (code.offsets, code.indices, code.values))


def _filed(
    parts: list[tuple], text: Text, first: int, stop: int, d_sae: int, name: str
) -> dict[str, np.ndarray]:
    """Codes of batches as compressed columns of the shard."""
    base, size = int(text.offsets[first]), int(text.offsets[stop] - text.offsets[first])
    fires = _columns([(p, f) for p, f, _ in parts], base, size, d_sae)
    found = {f"{name}{key}": value for key, value in fires.items()}
    wide = [(p, w) for p, _, w in parts if w is not None]
    near = nearest_misses(
        fires, _columns(wide, base, size, d_sae) if wide else None, text.context[base : base + size]
    )
    return found | {f"{name}near_{key}": value for key, value in near.items()}


def _columns(parts: list[tuple], base: int, size: int, d_sae: int) -> dict[str, np.ndarray]:
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    lengths = np.zeros(size + 1, dtype=np.int64)
    for places, (offsets, _, _) in parts:
        lengths[places - base + 1] = np.diff(offsets)
    indices = np.concatenate([code[1] for _, code in parts])
    values = np.concatenate([code[2] for _, code in parts])
    table = csr_array((values, indices, np.cumsum(lengths)), shape=(size, d_sae)).tocsc()
    return {
        "offsets": table.indptr.astype(np.int64),
        "places": table.indices.astype(np.int32),
        "values": table.data,
    }


def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        write_tensors(file, tensors)
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        raise InputError(
            f"{file} cannot be written: {error.strerror or error} ({free / 2**20:,.0f} MiB are "
            "free there); make room and run the command again, and it goes on"
        ) from None
