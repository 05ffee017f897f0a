"""An activation store: many sites of a model in one pass, shuffled, on disk or behind a URL.

The store is a folder:

- `SITE/NNNNNN.safetensors`: shard NNNNNN of a site, such as `3.mlp_in/000000.safetensors`; the
  layout is in `_shard_file.py`. Row `i` of a shard is the same token at every site.
- `statistics.safetensors`: for each site its mean vector, F64 `[d]`.
- `manifest.json`: what it all is (`_manifest.py`); written last, so a store without one is not
  finished.

Three lines read a shard:

    from safetensors.torch import load_file
    shard = load_file("3.mlp_in/000000.safetensors")
    x = shard["activations"]

Every token draws a random key, and the store holds the tokens in the order of their keys, which is
a uniformly random order. To sort more than memory holds, tokens are first appended to buckets by
ranges of keys, in a scratch folder; then each bucket is sorted in memory. A bucket that memory
cannot hold is divided again. The order, and every byte, follow from contents and seed alone: not
from the memory given, nor from how often the run was interrupted.
"""

import hashlib
import json
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from safetensors.torch import save

from gemscope import __version__
from gemscope.corpus import Context
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sites import Site

from ._forward import Forward
from ._gather import Gather, bucket_count
from ._manifest import FORMAT, MANIFEST, STATISTICS, Contents, Manifest
from ._place import Place, remove, write_whole
from ._progress import Progress
from ._records import DTYPES, row_bytes
from ._scatter import Scatter, random_keys, record_bytes
from ._seeds import generator

_CHUNK = 2**20
"""Bytes of a site that share a checksum, about."""
_PASS = 8_192
"""Tokens of a forward pass, about; with it numbers change in their last bits."""
_SAVE_EVERY = 30.0
"""Seconds of work that an interruption may cost, about."""
_LEAST_MEMORY = 16


class Stopped(Exception):  # noqa: N818
    """The harvest was asked to stop, and can go on."""


def harvest(
    model: LanguageModel,
    rows: Sequence[Context],
    sites: Sequence[Site],
    to: str,
    *,
    tokens: int,
    context: int,
    text: str,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_mb: int = 256,
    memory_mb: int = 2_048,
    scratch: Path | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Write the activations of up to `tokens` tokens of `rows` at `sites` to the store `to`.

    `memory_mb` bounds what is held beside the model. An interrupted harvest goes on when the same
    is asked for again; asked to stop, it raises `Stopped`. `text` says in words what `rows` are.
    """
    place = Place(to)
    forward = Forward(model, tuple(dict.fromkeys(sites)))
    _check(forward, dtype, tokens, shard_mb, memory_mb)
    if place.read(MANIFEST, 1) is not None:
        raise InputError(f"{to} is a finished store; choose another place, or remove it")
    available = int(forward.counted(rows).sum())
    if not available:
        raise InputError("the text has no tokens that count; give more text")
    contents = _contents(
        forward, rows, tokens=min(tokens, available), context=context, text=text, dtype=dtype,
        seed=seed, shard_mb=shard_mb,
    )  # fmt: skip
    folder = scratch or _scratch(place)
    memory = memory_mb * 2**20 // 2
    with _writing(folder):
        progress = Progress.load(folder, contents)
        if progress is None:
            if not place.is_empty():
                raise InputError(
                    f"{to} is not empty, and nothing in {folder} says that a harvest goes on "
                    "there; choose another place"
                )
            folder.mkdir(parents=True, exist_ok=True)
            size = contents.tokens * record_bytes(contents)
            progress = Progress.begin(folder, contents, bucket_count(size, memory))
            progress.save()
        _scatter(forward, rows, progress, memory, report, stopping)
        gather = Gather(progress, place, memory)
        total = contents.tokens
        if not gather.run(lambda done: report("shuffling", done, total), stopping):
            raise Stopped(f"stopped while shuffling; {_GO_ON}")
        manifest = _finish(progress, place)
    remove(folder)
    return manifest


_GO_ON = "what is written is kept: run the same command to go on"


def _check(forward: Forward, dtype: str, tokens: int, shard_mb: int, memory_mb: int) -> None:
    if not forward.sites:
        raise InputError("no sites were given; name some, such as 0-5.resid_post")
    if dtype not in DTYPES:
        raise InputError(f"no such type of a store: {dtype!r}; use {', '.join(DTYPES)}")
    for name, value, least in (
        ("tokens", tokens, 1),
        ("shard-mb", shard_mb, 1),
        ("memory-mb", memory_mb, _LEAST_MEMORY),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; take {least} or more")


def _contents(
    forward: Forward,
    rows: Sequence[Context],
    *,
    tokens: int,
    context: int,
    text: str,
    dtype: str,
    seed: int,
    shard_mb: int,
) -> Contents:
    model = forward.model
    widest = max(row_bytes(dtype, width) for width in forward.widths.values())
    chunk = max(1, _CHUNK // widest)
    config = model.config.to_dict()
    for passing in ("transformers_version", "_name_or_path"):
        config.pop(passing, None)
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(array("q", [len(row.ids), *row.ids]).tobytes())
    return Contents(
        model=model.name or Path(str(model.hf.name_or_path)).name,
        model_hash=_hash(json.dumps(config, sort_keys=True, default=str)),
        tokenizer_hash=_hash(json.dumps(model.tokenizer.get_vocab(), sort_keys=True)),
        text=text,
        text_hash=digest.hexdigest(),
        context=context,
        seed=seed,
        dtype=dtype,
        tokens=tokens,
        sites={str(site): width for site, width in forward.widths.items()},
        shard=max(1, shard_mb * 2**20 // widest // chunk) * chunk,
        chunk=chunk,
    )


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _scratch(place: Place) -> Path:
    if place.local is not None:
        folder = place.local.absolute()
        return folder.with_name(f".{folder.name}.harvest")
    return Path(tempfile.gettempdir()) / f"gemscope-harvest-{_hash(place.url)}"


@contextmanager
def _writing(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the harvest, with its scratch folder {scratch}, cannot be written: "
            f"{error.strerror or error}; make room, then: {_GO_ON}"
        ) from None


def _scatter(
    forward: Forward,
    rows: Sequence[Context],
    progress: Progress,
    memory: int,
    report: Callable[[str, int, int], None],
    stopping: Callable[[], bool],
) -> None:
    """Run the model, and append what it gives to the buckets."""
    state, contents = progress.state, progress.state.contents
    if state.tokens == contents.tokens:
        return
    for bucket in state.buckets:
        progress.mend(bucket, record_bytes(contents))
    scatter = Scatter(progress.scratch, state.buckets, record_bytes(contents), memory)

    def save_progress() -> None:
        scatter.flush()
        progress.sums.check()
        progress.save()

    saved = time.monotonic()
    batches = forward.packed(rows, max(1, _PASS // contents.context), contents.tokens)
    for batch in islice(batches, state.batches, None):
        if stopping():
            save_progress()
            raise Stopped(f"stopped after {state.tokens} of {contents.tokens} tokens; {_GO_ON}")
        keys = random_keys(batch.n_counted, generator(contents.seed, "keys", state.batches))
        values = {str(site): value for site, value in forward.read(batch).items()}
        wrote = scatter.add(contents, keys, values, progress.sums)
        del values  # before the next forward pass makes as many again
        state.batches, state.tokens = state.batches + 1, state.tokens + len(keys)
        progress.sums.count = state.tokens
        if wrote or time.monotonic() - saved > _SAVE_EVERY:
            save_progress()
            saved = time.monotonic()
        report("harvesting", state.tokens, contents.tokens)
    save_progress()


def _finish(progress: Progress, place: Place) -> Manifest:
    """Write what describes the store, the manifest last."""
    manifest = Manifest(
        format=FORMAT,
        gemscope=__version__,
        contents=progress.state.contents,
        statistics=progress.sums.statistics(),
        checksums=tuple(progress.state.shards),
    )
    for name, data in (
        (STATISTICS, save(progress.sums.means())),
        (MANIFEST, manifest.model_dump_json(indent=1).encode()),
    ):
        part = place.near(name, progress.scratch)
        write_whole(part, data)
        place.publish(part, name)
    return manifest
