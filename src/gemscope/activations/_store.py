"""An activation store as a source: what `harvest` wrote, read at the speed of the disk.

Batches are read into memory of their own, by one thread that is a few batches ahead. Every chunk is
checked against its checksum the first time it is read.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor

from gemscope import miniature
from gemscope.errors import InputError
from gemscope.hub import model_source
from gemscope.sites import Site

from ._chunks import Checked, Chunks, Corrupt
from ._manifest import MANIFEST, STATISTICS, Manifest, file_name, parse_manifest
from ._place import Place
from ._records import decode
from ._serving import Piece, Serving
from ._source import ActivationBatch, Position

_LARGEST_MANIFEST = 2**30
_TASK = 2**24
"""Bytes that are read in one go, about."""
_AHEAD = 2
"""How many goes the reading thread is ahead."""
_NAMED = 3
"""Bad files that a message names."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch to be read: where its rows are, and the position behind it."""

    pieces: list[Piece]
    after: Position


_Made = tuple[dict[Site, Tensor] | str, Position]
"""A batch's values, or the name of the file they cannot be read from; the position behind it."""


def open_store(
    url: str,
    *,
    model_name: str | None = None,
    sites: Sequence[Site] | None = None,
    batch: int,
    seed: int,
    skip_corrupt: bool = False,
    dtype: torch.dtype | None = None,
) -> "ActivationStore":
    """The store at `url`, a folder or whatever fsspec opens, to be read at `sites`, or at all.

    With `model_name`, it must be of that model. Batches are of `dtype`; left out, as they are
    stored, and `int8` as float32. Files that are missing or damaged are refused, or, with
    `skip_corrupt`, warned of, and the batches with tokens of theirs are left out.
    """
    place = Place(url)
    raw = place.read(MANIFEST, _LARGEST_MANIFEST)
    if raw is None:
        raise InputError(
            f"no activation store at {url}: it has no {MANIFEST}, which a harvest writes last; "
            "give a finished one, or run the harvest to its end"
        )
    manifest = parse_manifest(raw, store=url)
    contents = manifest.contents
    if model_name is not None and _identity(model_name) != contents.model:
        raise InputError(
            f"the store {url} holds activations of {contents.model}, not of {model_name}; give "
            "that model, or another store"
        )
    held = tuple(Site.parse(site) for site in contents.sites)
    wanted = held if sites is None else tuple(dict.fromkeys(sites))
    if absent := [site for site in wanted if site not in held]:
        raise InputError(
            f"the store {url} holds {', '.join(map(str, held))}, not "
            f"{', '.join(map(str, absent))}; ask for sites it holds, or harvest them"
        )
    if not 0 < batch <= contents.tokens:
        raise InputError(
            f"a batch is {batch} tokens, and the store {url} holds {contents.tokens}; take a "
            "smaller batch, at least 1"
        )
    checked = Checked(manifest)
    checked.bad |= _misfits(place, manifest, wanted)
    if checked.bad:
        _tell(url, checked.bad, skip_corrupt)
    return ActivationStore(
        place, checked, wanted, batch=batch, seed=seed, skip_corrupt=skip_corrupt, dtype=dtype
    )


class ActivationStore:
    """Batches of stored activations, endless over epochs; see `open_store`."""

    model_seconds = 0.0

    def __init__(
        self,
        place: Place,
        checked: Checked,
        sites: tuple[Site, ...],
        *,
        batch: int,
        seed: int,
        skip_corrupt: bool,
        dtype: torch.dtype | None,
    ):
        self.manifest: Manifest = checked.manifest
        self.sites, self.batch, self.seed, self.dtype = sites, batch, seed, dtype
        self.tokens = self.manifest.contents.tokens
        self._place, self._checked, self._skip = place, checked, skip_corrupt
        self._told = set(checked.bad)
        self._serving = Serving(self.manifest.contents, batch, seed)

    def means(self) -> dict[Site, Float[Tensor, " d"]]:
        """The mean vector of each site over the whole store, in float64."""
        raw = self._place.read(STATISTICS, _LARGEST_MANIFEST) or b""
        try:
            found = load(raw)
            return {site: found[str(site)] for site in self.sites}
        except Exception:  # the library's errors have no common class
            raise InputError(
                f"{STATISTICS} of the store {self._place.url} cannot be read; get the store again"
            ) from None

    def sample(self, tokens: int) -> dict[Site, Float[Tensor, "n d"]]:
        """Up to `tokens` activations, the first that are served, in float32."""
        pieces = self._serving.pieces(0, min(tokens, self.tokens), 0)
        kept: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        with closing(Chunks(self._place, self._checked)) as chunks:
            for piece in pieces:
                made = self._read(chunks, [piece], piece.last - piece.first, torch.float32)
                if isinstance(made, str):
                    self._refuse(made)
                    continue
                for site, values in made.items():
                    kept[site].append(values)
        if not all(kept.values()):
            raise self._nothing_left()
        return {site: torch.cat(values) for site, values in kept.items()}

    def batches(
        self, start: Position = Position(), stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ActivationBatch]:
        """Batches from `start` on, without end unless `stopping` says so."""
        chunks = Chunks(self._place, self._checked)
        pool = ThreadPoolExecutor(1, "gemscope-store")
        tasks = self._tasks(*self._serving.cutting.start(start))
        waiting: deque[Future[list[_Made]]] = deque()
        skipped = 0
        try:
            while not stopping():
                while len(waiting) <= _AHEAD:
                    waiting.append(pool.submit(self._make, chunks, next(tasks)))
                for made, after in waiting.popleft().result():
                    if stopping():
                        return
                    if isinstance(made, str):
                        self._refuse(made)
                        skipped += 1
                        if skipped * self.batch > self.tokens:
                            raise self._nothing_left()
                        continue
                    skipped = 0
                    yield ActivationBatch(made, after)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            chunks.close()

    def _tasks(self, number: int, round_: int) -> Iterator[list[_Planned]]:
        """The batches of the row from `number` on, some to a task; the first is in `round_`."""
        files = [self.manifest.contents.file(str(site), 0) for site in self.sites]
        count = max(1, _TASK // (self.batch * sum(file.row_bytes for file in files)))
        serving = self._serving
        while True:
            task = []
            for index in range(number, number + count):
                first, last = index * self.batch, (index + 1) * self.batch
                pieces = list(serving.pieces(first, last, round_))
                while serving.before(round_ + 1) < last:
                    round_ += 1
                task.append(_Planned(pieces, serving.cutting.after(index, round_)))
                if serving.before(round_ + 1) == last:
                    round_ += 1
            yield task
            number += count

    def _make(self, chunks: Chunks, task: list[_Planned]) -> list[_Made]:
        return [(self._read(chunks, p.pieces, self.batch, self.dtype), p.after) for p in task]

    def _read(
        self, chunks: Chunks, pieces: list[Piece], count: int, dtype: torch.dtype | None
    ) -> dict[Site, Tensor] | str:
        """The activations of `pieces`, or the name of the file that they cannot be read from."""
        stored, made = self.manifest.contents.dtype, {}
        try:
            for site in self.sites:
                rows = chunks.read(str(site), pieces, count)
                made[site] = decode(torch.from_numpy(rows), stored, dtype)
        except Corrupt as corrupt:
            return corrupt.name
        return made

    def _refuse(self, name: str) -> None:
        """Say that a file is damaged: once, where damage is left out."""
        if name not in self._told:
            _tell(self._place.url, {name}, self._skip)
        self._told.add(name)

    def _nothing_left(self) -> InputError:
        return InputError(
            f"the store {self._place.url} has no intact tokens left to read; get it again"
        )


def _identity(name: str) -> str:
    bundled = model_source(name) == str(miniature.MODEL)
    return miniature.MODEL_NAME if bundled else name


def _misfits(place: Place, manifest: Manifest, sites: tuple[Site, ...]) -> set[str]:
    """Files that are missing, or not of the size that the manifest implies."""
    found = set()
    for site in map(str, sites):
        sizes = place.sizes(site)
        for index in range(manifest.contents.shards):
            name = file_name(site, index)
            if sizes.get(name) != manifest.contents.file(site, index).size:
                found.add(name)
    return found


def _tell(url: str, names: set[str], skip: bool) -> None:
    shown = ", ".join(sorted(names)[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    what = f"missing or damaged in the store {url}: {shown}{more}"
    if not skip:
        raise InputError(f"{what}; get them again, or read around them with skip_corrupt")
    warnings.warn(f"{what}; batches with tokens of theirs are left out", stacklevel=3)
