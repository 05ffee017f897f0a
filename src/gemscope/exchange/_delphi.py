"""delphi's cache of activations, by split of the features.

`{folder}/{module}/{start}_{end}.safetensors` (end included) holds `locations` `[nnz, 3]` (row,
position, feature - start), `activations` float16 `[nnz]` and `tokens` `[rows, context]`, the same
in every split; `config.json` beside them. Ours have in it, under `gemscope`, what the layout has
no place for: lengths of contexts, where they are from, which tokens count.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Activations, Text, write_activations

from ._files import dump, finite, new_folder, read_json
from ._measured import Measured, Progress

if TYPE_CHECKING:
    from scipy.sparse import csc_array  # type: ignore[import-untyped]

SPLITS = 5
_BLOCK = 1024
_LARGEST = np.finfo(np.float16).max
_SMALL = 2**16
_MOST_FEATURES = 2**26
_MOST_TOKENS = 2**31
LOST = (
    "values are rounded to float16: three significant digits",
    "statistics, labels and near misses: the layout holds activations alone",
)


def write_delphi(
    target: Path,
    measured: Sequence[Measured],
    *,
    splits: int = SPLITS,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[int, list[str]]:
    """Write a folder of a module a dictionary; its features, and what was lost.

    Features that were not chosen have no entries. A module is named as the address, with points
    for slashes: delphi lists the folders of its cache, and takes each for a module.
    """
    kept = {one.address: _kept(one) for one in measured}
    done, total = 0, sum(len(one.chosen) for one in measured)
    zeros = large = 0
    with new_folder(target, force=force) as folder:
        for one in measured:
            activations = kept[one.address]
            module = folder / module_of(one.address)
            module.mkdir()
            width = activations.d_sae(one.address)
            tokens = _padded(activations.text, _pad(one.tokenizer))
            borders = np.linspace(0, width, min(splits, width) + 1).astype(np.int64)
            for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
                found = _split(activations, one, start, stop)
                zeros += int((found["activations"] == 0).sum())
                large += int((found["activations"] == _LARGEST).sum())
                _save(module / f"{start}_{stop - 1}.safetensors", found | {"tokens": tokens})
                done += sum(start <= f < stop for f in one.chosen)
                progress("writing", done, total)
            config = _config(one, activations.text, tokens.shape[1], len(borders) - 1)
            (module / "config.json").write_text(dump(finite(config)), "utf-8")
    told = list(LOST)
    if zeros:
        told.append(f"{zeros:,} value(s) below what float16 holds are 0; they keep their entries")
    if large:
        told.append(f"{large:,} value(s) above what float16 holds are {_LARGEST:g}")
    return done, told


def module_of(address: str) -> str:
    """The name of a dictionary's folder."""
    return re.sub(r"[^\w.=+-]+", ".", address).strip(".") or "module"


def modules(path: Path) -> list[Path]:
    """The folders of modules below `path`, or `path` itself if it is one."""
    if any(path.glob("*_*.safetensors")):
        return [path]
    return sorted({file.parent for file in path.glob("**/*_*.safetensors")}) or [path]


def import_delphi(path: Path, folder: Path, address: str | None = None) -> Activations:
    """The activations of one module's folder, written to `folder` in the layout of a store.

    They are named `address`, by default what the cache says or the folder's name.
    """
    found = modules(path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:3])
        raise InputError(f"{path} holds {len(found)} modules ({names}); name the folder of one")
    path = found[0]
    text, code, config = read_delphi(path)
    ours = config.get("gemscope")
    known = ours.get("address") if isinstance(ours, dict) else None
    name = address or (known if isinstance(known, str) else path.name)
    facts = {"model": str(config.get("model_name")), "dtype": "float16", "origin": "delphi"}
    with new_folder(folder) as new:
        write_activations(new, text, {name: code}, **facts)
    return Activations.open(folder)


def read_delphi(path: Path) -> "tuple[Text, csc_array, dict[str, Any]]":
    """Text, activations `[n_places, d_sae]` float32 and `config.json` of one module's folder."""
    from scipy.sparse import coo_array

    files = _splits(path)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'} is not an object")
    width = files[-1][1] + 1
    tokens: np.ndarray | None = None
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for start, end, file in files:
        found = _load(file)
        if "tokens" in found and tokens is None:
            tokens = found["tokens"].astype(np.int64)
        parts.append((_locations(file, found, start, end), found["activations"]))
    if tokens is None:
        raise InputError(f"{path} was cached without tokens: nothing says what it fires on")
    text = _text(path, tokens, config.get("gemscope"))
    rows, context = tokens.shape
    lengths = np.diff(text.offsets)
    places, features, values = [], [], []
    for locations, activations in parts:
        row, position, feature = locations.T
        if len(row) and (row.max() >= rows or (position >= lengths[row]).any()):
            raise InputError(f"{path} has entries outside its {rows} rows of {context} tokens")
        places.append(text.offsets[row] + position)
        features.append(feature)
        values.append(activations.astype(np.float32))
    where = (np.concatenate(places), np.concatenate(features))
    code = coo_array((np.concatenate(values), where), shape=(len(text.ids), width)).tocsc()
    if code.nnz != len(where[0]):
        raise InputError(f"{path} has two entries for one token and feature")
    if not np.isfinite(code.data).all():
        raise InputError(f"{path} has activations that are no numbers")
    return text, code, config


def _kept(one: Measured) -> Activations:
    kept = one.store.activations(one.address)
    if kept is None:
        raise InputError(
            f"the activations of {one.address} were not kept; "
            f"gemscope index {one.address} --to {one.store.folder} --keep-activations keeps them"
        )
    return kept


def _pad(tokenizer: Any) -> int:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if (known := getattr(tokenizer, name, None)) is not None:
            return int(known)
    return 0


def _padded(text: Text, pad: int) -> np.ndarray:
    """The contexts as rows of one length, int64 `[n_contexts, longest]`."""
    lengths = np.diff(text.offsets)
    tokens = np.full((len(lengths), int(lengths.max())), pad, dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = text.ids
    return tokens


def _split(activations: Activations, one: Measured, start: int, stop: int) -> dict[str, np.ndarray]:
    text, chosen = activations.text, np.zeros(stop, dtype=bool)
    chosen[[f for f in one.chosen if f < stop]] = True
    places, features, values = [], [], []
    for first in range(start, stop, _BLOCK):
        entries = activations.entries(one.address, first, min(first + _BLOCK, stop))
        feature = entries.features + first
        keep = chosen[feature]
        places.append(entries.places[keep])
        features.append(feature[keep])
        values.append(entries.values[keep])
    place, feature = np.concatenate(places), np.concatenate(features)
    order = np.lexsort((feature, place))  # token by token, as delphi finds them
    place, feature = place[order], feature[order] - start
    context = text.context_of(place).astype(np.int64)
    locations = np.stack((context, place - text.offsets[context], feature), axis=1)
    small = not len(place) or (context.max() < _SMALL and feature.max() < _SMALL)
    value = np.minimum(np.concatenate(values)[order], _LARGEST)
    return {
        "locations": locations.astype(np.uint16 if small else np.uint32),
        "activations": value.astype(np.float16),
    }


def _config(one: Measured, text: Text, context: int, splits: int) -> dict[str, Any]:
    known = one.dictionary
    return {
        "dataset_repo": "gemscope",
        "dataset_split": ", ".join(text.sources),
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": context,
        "ctx_len": context,  # its name in older releases
        "n_tokens": len(text.document) * context,
        "n_splits": splits,
        "model_name": known["model"],
        "gemscope": {
            "address": one.address,
            "digest": known.get("digest"),
            "lengths": np.diff(text.offsets).tolist(),
            "document": text.document.tolist(),
            "start": text.start.tolist(),
            "paths": list(text.paths),
            "sources": list(text.sources),
            "source": text.source.tolist(),
            "not_counted": np.flatnonzero(~text.counts).tolist(),
        },
    }


def _save(file: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file)
    file.chmod(0o644)


def _splits(path: Path) -> list[tuple[int, int, Path]]:
    found = []
    for file in path.glob("*_*.safetensors"):
        match = re.fullmatch(r"(\d{1,9})_(\d{1,9})\.safetensors", file.name)
        if match:
            found.append((int(match[1]), int(match[2]), file))
    found.sort()
    if not found:
        raise InputError(f"{path} holds no START_END.safetensors: name the folder of one module")
    expected = 0
    for start, end, file in found:
        if start != expected or end < start or end >= _MOST_FEATURES:
            raise InputError(f"{file}: features {expected} onwards are missing or come twice")
        expected = end + 1
    return found


def _load(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
    locations, activations = found.get("locations"), found.get("activations")
    if (
        locations is None
        or activations is None
        or locations.shape != (len(activations), 3)
        or activations.ndim != 1
        or locations.dtype.kind not in "ui"
        or activations.dtype.kind != "f"
    ):
        raise InputError(f"{file} lacks locations [n, 3] of integers and activations [n]")
    return found


def _locations(file: Path, found: dict[str, np.ndarray], start: int, end: int) -> np.ndarray:
    locations = found["locations"].astype(np.int64)
    if len(locations) and (locations.min() < 0 or locations[:, 2].max() > end - start):
        raise InputError(f"{file} has entries of features that are not {start} to {end}")
    locations[:, 2] += start
    return locations


def _text(path: Path, tokens: np.ndarray, ours: Any) -> Text:
    if tokens.ndim != 2 or not tokens.size or tokens.size > _MOST_TOKENS or tokens.min() < 0:
        raise InputError(f"the tokens of {path} are not rows of token ids")
    if isinstance(ours, dict):
        return _own_text(path, tokens, ours)
    rows, context = tokens.shape
    counts = np.ones(tokens.shape, dtype=bool)
    # A first token that is the same everywhere is BOS: in the input, in no statistic.
    if rows > 1 and (tokens[:, 0] == tokens[0, 0]).all():
        counts[:, 0] = False
    return Text(
        ids=tokens.reshape(-1).astype(np.int32),
        counts=counts.reshape(-1),
        offsets=np.arange(rows + 1, dtype=np.int64) * context,
        document=np.arange(rows, dtype=np.int32),
        start=np.zeros(rows, dtype=np.int32),
        paths=[f"{path.name} row {row}" for row in range(rows)],
        sources=["delphi"],
        source=np.zeros(rows, dtype=np.int32),
    )


def _own_text(path: Path, tokens: np.ndarray, ours: dict[str, Any]) -> Text:
    try:
        lengths = np.array(ours["lengths"], dtype=np.int64)
        document = np.array(ours["document"], dtype=np.int32)
        source = np.array(ours["source"], dtype=np.int32)
        start = np.array(ours["start"], dtype=np.int32)
        without = np.array(ours["not_counted"], dtype=np.int64)
        paths, sources = list(map(str, ours["paths"])), list(map(str, ours["sources"]))
        rows, context = tokens.shape
        ids = tokens[np.arange(context) < lengths[:, None]].astype(np.int32)
        counts = np.ones(len(ids), dtype=bool)
        counts[without] = False
        whole = lengths.shape == document.shape == start.shape == (rows,)
        inside = lengths.min() > 0 and lengths.max() <= context and without.min(initial=0) >= 0
        named = document.min() >= 0 and document.max() < len(paths) == len(source)
        if not (whole and inside and named and 0 <= source.min() <= source.max() < len(sources)):
            raise ValueError("its parts do not fit")
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise InputError(
            f"{path / 'config.json'}: what gemscope wrote there does not fit the tokens ({error})"
        ) from None
    return Text(
        ids=ids, counts=counts, offsets=np.concatenate(([0], np.cumsum(lengths))),
        document=document, start=start, paths=paths, sources=sources, source=source,
    )  # fmt: skip
