"""Reading an activation store, beside a plain read of the same bytes."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

_TOKENS, _BATCH = 65_536, 4_096
_ROUNDS = 7


def store() -> Iterator[dict]:
    """Batches of a store in the page cache: the first reading, which checks, and a later one.

    The plain reads are of the same files in the same order, alternating with ours: into one buffer
    of a megabyte, which nothing can be faster than, and into memory of its own a file at a time,
    which is what a program has to do that wants the numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "int8"):
            made = Path(folder) / dtype
            _write(made, dtype)
            yield from _measured(made, dtype)


def _measured(folder: Path, dtype: str) -> Iterator[dict]:
    files = sorted(folder.glob("*/*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    found: dict[str, list[float]] = {"buffer": [], "files": [], "first": [], "later": []}
    for _ in range(_ROUNDS):
        opened = _open(folder)
        found["buffer"].append(_seconds(lambda: _plain_buffer(files)))
        found["first"].append(_seconds(lambda o=opened: _epoch(o)))
        found["files"].append(_seconds(lambda: _plain_files(files)))
        found["later"].append(_seconds(lambda o=opened: _epoch(o)))
    median = {what: statistics.median(took) for what, took in found.items()}
    for what in ("first", "later"):
        yield {
            "command": f"read {len(opened.sites)} sites of a {dtype} store, {what} time",
            "seconds": median[what],
            "tokens": _TOKENS,
            "bytes_per_second": size / median[what],
            "ratio_to_plain_read": median["buffer"] / median[what],
            "ratio_to_plain_read_into_memory": median["files"] / median[what],
        }


def _open(folder: Path):
    from gemscope.activations import open_store

    return open_store(str(folder), batch=_BATCH, seed=0)


def _epoch(opened) -> None:
    for _ in islice(opened.batches(), opened.tokens // _BATCH):
        pass


def _plain_buffer(files: list[Path]) -> None:
    buffer = bytearray(2**20)
    for file in files:
        with file.open("rb", buffering=0) as raw:
            while raw.readinto(buffer):
                pass


def _plain_files(files: list[Path]) -> None:
    import numpy as np

    for file in files:
        np.fromfile(file, np.uint8)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _write(folder: Path, dtype: str) -> None:
    from gemscope.activations import harvest
    from gemscope.corpus import contexts, read_text
    from gemscope.lm import load_model
    from gemscope.sites import Site

    model = load_model("miniature", device="cpu")
    rows = list(contexts(read_text("miniature"), model.tokenizer, length=256))
    sites = [Site.parse(f"{layer}.mlp_hidden") for layer in range(model.n_layers)]
    harvest(
        model, rows, sites, str(folder), tokens=_TOKENS, context=256, text="miniature", dtype=dtype
    )
