"""Every activation of some dictionaries on a text, in files that are read by feature.

A folder of `plan.json` (what is being collected), `text.safetensors`, shards
`000000.safetensors`, ... of whole contexts, and at the end `index.json`. Each shard holds for the
dictionary with number `k`, as compressed columns: `k.offsets` int64 `[d_sae + 1]`, `k.places`
int32 `[nnz]` counted from the shard's first place, `k.values` float32 `[nnz]`, and the same as
`k.near_*` for near misses.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemscope.activations import write_whole
from gemscope.errors import InputError, did_you_mean

from ._text import Text

if TYPE_CHECKING:
    from scipy.sparse import csc_array  # type: ignore[import-untyped]

VERSION = 1
_ARRAYS = ("ids", "counts", "offsets", "document", "start", "source")


@dataclass(frozen=True, slots=True)
class Entries:
    """Activations of some features, feature after feature, places ascending within one."""

    offsets: np.ndarray
    """int64 `[n_features + 1]`."""
    places: np.ndarray
    """int64 `[nnz]`."""
    values: np.ndarray
    """float32 `[nnz]`."""

    @property
    def features(self) -> np.ndarray:
        """The feature of each entry, from 0, int64 `[nnz]`."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class Activations:
    """Activations of several dictionaries on one text, by feature."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder, self.index = folder, index
        self.text = read_text_arrays(folder)
        self.addresses: list[str] = list(index["addresses"])
        # First context of each shard, and the number of contexts.
        self._borders: list[int] = index["borders"]
        self._files = [folder / f"{i:06d}.safetensors" for i in range(len(self._borders) - 1)]

    @classmethod
    def open(cls, folder: Path) -> "Activations":
        """What was collected in `folder`, all of it."""
        folder = Path(folder)
        index = read_json(folder / "index.json")
        if index is None:
            half = (folder / "plan.json").is_file()
            raise InputError(
                f"{folder} is half-written: run the command that began it again, and it goes on"
                if half
                else f"{folder} holds no activations by feature; gemscope index ADDRESS "
                "--keep-activations makes them"
            )
        if index.get("version") != VERSION:
            raise InputError(
                f"{folder} has version {index.get('version')} of the layout and this gemscope "
                f"reads {VERSION}; update gemscope, or collect again"
            )
        return cls(folder, index)

    def d_sae(self, address: str) -> int:
        """Number of features of a dictionary."""
        return int(self.index["d_sae"][self._number(address)])

    def entries(self, address: str, first: int, stop: int) -> Entries:
        """Every activation of the features `first` to `stop`; memory is that of what is asked."""
        return self._read(address, first, stop, "")

    def of(self, address: str, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The places where one feature fires, and its values there."""
        found = self.entries(address, feature, feature + 1)
        return found.places, found.values

    def near(self, address: str, first: int, stop: int) -> Entries:
        """The strongest pre-activations under the threshold, in contexts where the feature is
        silent: at most a few of each shard.
        """
        return self._read(address, first, stop, "near_")

    def codes(self, address: str) -> "Iterator[tuple[int, int, csc_array]]":
        """`(first place, stop place, [n_places, d_sae])` of each shard, in order."""
        from scipy.sparse import csc_array

        number, d_sae = self._number(address), self.d_sae(address)
        for shard, file in enumerate(self._files):
            first, stop = self._span(shard)
            with self._opened(file) as stored:
                parts = [
                    stored.get_tensor(f"{number}.{n}") for n in ("values", "places", "offsets")
                ]
            yield first, stop, csc_array(tuple(parts), shape=(stop - first, d_sae))

    def _read(self, address: str, first: int, stop: int, kind: str) -> Entries:
        number, d_sae = self._number(address), self.d_sae(address)
        if not 0 <= first < stop <= d_sae:
            raise InputError(f"no features {first} to {stop - 1}: {address} has 0 to {d_sae - 1}")
        counts, places, values = [], [], []
        for shard, file in enumerate(self._files):
            with self._opened(file) as stored:
                ends = stored.get_slice(f"{number}.{kind}offsets")[first : stop + 1]
                found = [_part(stored, f"{number}.{kind}{n}", ends) for n in ("places", "values")]
            places.append(found[0].astype(np.int64) + self._span(shard)[0])
            values.append(found[1].astype(np.float32))
            counts.append(np.diff(ends))
        return joined(counts, places, values)

    def _number(self, address: str) -> int:
        if address not in self.addresses:
            raise InputError(
                f"{self.folder} has no activations of {address}; "
                f"{did_you_mean(address, self.addresses)}"
            )
        return self.addresses.index(address)

    def _span(self, shard: int) -> tuple[int, int]:
        first, stop = self._borders[shard : shard + 2]
        return int(self.text.offsets[first]), int(self.text.offsets[stop])

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, "np")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} is missing or damaged ({error}); delete the folder and collect again"
            ) from None


def _part(stored: Any, name: str, ends: np.ndarray) -> np.ndarray:
    first, last = int(ends[0]), int(ends[-1])
    # An empty part at the end of a tensor is out of bounds to safetensors.
    return stored.get_slice(name)[first:last] if last > first else np.zeros(0, dtype=np.int32)


def joined(
    counts: Sequence[np.ndarray], places: Sequence[np.ndarray], values: Sequence[np.ndarray]
) -> Entries:
    """Parts of the text, each sorted by feature, as one; parts in ascending order of places."""
    table = np.stack(counts)  # [n_parts, n_features]
    offsets = np.concatenate(([0], np.cumsum(table.sum(0))))
    if len(places) == 1:
        return Entries(offsets, places[0], values[0])
    # Entries of a part go behind those of features before, and of parts before: no sort.
    shift = offsets[:-1] + np.cumsum(table, 0) - table - (np.cumsum(table, 1) - table)
    place = np.empty(int(offsets[-1]), dtype=np.int64)
    value = np.empty(len(place), dtype=np.float32)
    for row, p, v, s in zip(table, places, values, shift, strict=True):
        to = np.repeat(s, row) + np.arange(len(p))
        place[to], value[to] = p, v
    return Entries(offsets, place, value)


def write_activations(
    folder: Path, text: Text, codes: "Mapping[str, csc_array]", **facts: Any
) -> Activations:
    """Write activations `[n_places, d_sae]` of some dictionaries that are in memory already."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_arrays(folder, text)
    tensors: dict[str, np.ndarray] = {}
    for number, code in enumerate(codes.values()):
        columns = code.tocsc()
        columns.sort_indices()
        tensors |= {
            f"{number}.offsets": columns.indptr.astype(np.int64),
            f"{number}.places": columns.indices.astype(np.int32),
            f"{number}.values": columns.data.astype(np.float32),
            f"{number}.near_offsets": np.zeros(code.shape[1] + 1, dtype=np.int64),
            f"{number}.near_places": np.zeros(0, dtype=np.int32),
            f"{number}.near_values": np.zeros(0, dtype=np.float32),
        }
    write_tensors(folder / "000000.safetensors", tensors)
    index = facts | {
        "version": VERSION,
        "addresses": list(codes),
        "d_sae": [int(code.shape[1]) for code in codes.values()],
        "borders": [0, text.n_contexts],
    }
    write_whole(folder / "index.json", json.dumps(index).encode())
    return Activations.open(folder)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file that is there whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    save_file(tensors, part)
    part.replace(file)


def write_text_arrays(folder: Path, text: Text) -> None:
    """Write `text` into `folder`."""
    names = {"paths": text.paths, "sources": text.sources}
    arrays = {name: np.ascontiguousarray(getattr(text, name)) for name in _ARRAYS}
    write_tensors(folder / "text.safetensors", arrays)
    write_whole(folder / "text.json", json.dumps(names).encode())


def read_text_arrays(folder: Path) -> Text:
    """The text that `write_text_arrays` wrote into `folder`."""
    names = read_json(folder / "text.json")
    try:
        with safe_open(folder / "text.safetensors", "np") as stored:
            arrays = {name: stored.get_tensor(name) for name in _ARRAYS}
    except (OSError, SafetensorError):
        names = None
    if names is None:
        raise InputError(f"the text in {folder} is missing or damaged; index it again")
    return Text(**arrays, paths=names["paths"], sources=names["sources"])


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in `file`; None where there is none."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise InputError(f"{file} is damaged: it is not JSON") from None
    return found if isinstance(found, dict) else None
