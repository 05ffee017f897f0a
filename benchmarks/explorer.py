"""How long readers of the explorer wait: for the first page, for one page after the other, and
fifty at once while features are steered.

`python benchmarks/run.py --keep explorer` writes the records.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

ADDRESSES = tuple(f"miniature/resid_post_all/layer_{n}_width_384_l0_small" for n in (2, 3))
TOKENS, READERS, PAGES, PAUSE = 20_000, 50, 6, 2.0
LAYERS, FEATURES = 26, 16_384


def explorer() -> Iterator[dict]:
    """A server in a process of its own, on a store of two dictionaries."""
    import httpx2 as httpx

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        command = ["-m", "gemscope", "index", *ADDRESSES, "--tokens", str(TOKENS)]
        subprocess.run(
            [sys.executable, *command, "--keep-activations", "--to", str(store)],
            check=True, capture_output=True,
        )  # fmt: skip
        found = []
        for _ in range(4):
            began = time.perf_counter()
            with _Server(store) as address:
                httpx.get(address, timeout=60).raise_for_status()
                found.append(time.perf_counter() - began)
        yield {
            "command": "gemscope serve STORE, from the command to the first page", "tokens": 0,
            "seconds": min(found[1:]), "slowest_seconds": max(found[1:]),
        }  # fmt: skip
        with _Server(store) as address:
            yield from _pages(httpx, address)
            yield asyncio.run(_many(httpx, address))
        wide = _wide(store, Path(folder) / "wide")
        with _Server(wide) as address:
            paths = (f"/feature/made-up/layer_{i % LAYERS}/{i * 97 % FEATURES}" for i in range(300))
            yield _timed(httpx, address, f"a feature page, {LAYERS} x {FEATURES:,} features", paths)
            paths = (f"/feature/made-up/layer_3/{i}" for i in range(300))
            yield _timed(
                httpx, address, f"the next feature's page, {LAYERS} x {FEATURES:,} features", paths
            )


class _Server:
    def __init__(self, store: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemscope", "serve", str(store), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line.removeprefix("gemscope explorer: ").partition("/  (")[0]

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)


def _pages(httpx: Any, address: str) -> Iterator[dict]:
    text = quote("def parse(path):\n    return open(path).read()")
    long = quote("def parse(path):\n    return open(path).read()\n" * 16)
    one = quote(ADDRESSES[1])
    cases = {
        "a feature page": lambda i: f"/feature/{one}/{i}",
        "a feature on a text of 200 tokens": (
            lambda i: f"/api/feature/{one}/3/live?text={long}{i}"
        ),
        "a text of 14 tokens read": lambda i: f"/?sae={one}&text={text}{i}",
        "a search for a word": lambda i: f"/search?q=return{i % 3}",
        "the scope of 1,439 dictionaries": lambda _: "/scope?release=gemma-scope-2-27b-it&colour=l0",
    }  # fmt: skip
    for name, path in cases.items():
        yield _timed(httpx, address, name, map(path, range(65)))


def _timed(httpx: Any, address: str, name: str, paths: Iterable[str]) -> dict:
    """Seconds of one request after the other, without the first five."""
    found = []
    with httpx.Client(base_url=address, timeout=60) as client:
        for path in paths:
            began = time.perf_counter()
            client.get(path).raise_for_status()
            found.append(time.perf_counter() - began)
    found = sorted(found[5:])
    return {
        "command": name, "tokens": 0, "seconds": found[len(found) // 2],
        "p95_seconds": found[int(len(found) * 0.95)], "requests": len(found),
    }  # fmt: skip


def _wide(small: Path, folder: Path) -> Path:
    """A catalog of many wide dictionaries: the rows of one, over and over under other numbers."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from gemscope.features import Explanation, Store

    source, store = Store.open(small), Store.create(folder)
    shutil.copytree(small / "texts", folder / "texts")
    known = source.dictionary(ADDRESSES[1])
    rows = {}
    for name in ("features", "contexts"):
        table = source.table(name).to_arrow()
        rows[name] = table.filter(pc.equal(table["run"], known["run"])).sort_by("feature")
    for layer in range(LAYERS):
        address, run = f"made-up/layer_{layer}", f"run{layer}"
        for name, one in rows.items():
            parts = []
            for first in range(0, FEATURES, known["d_sae"]):
                part = one.filter(pc.less(one["feature"], FEATURES - first))
                numbers = pa.array((part["feature"].to_numpy() + first).astype(np.int32))
                for column, values in (
                    ("run", [run] * len(part)), ("dictionary", [address] * len(part)),
                    ("feature", numbers),
                ):  # fmt: skip
                    place = part.schema.get_field_index(column)
                    part = part.set_column(place, column, pa.array(values))
                parts.append(part)
            store.table(name).add(pa.concat_tables(parts).cast(store.table(name).schema))
        said = (
            Explanation(dictionary=address, feature=i, text=f"word {i}", method="rule", author="-")
            for i in range(FEATURES)
        )
        store.table("explanations").add([one.row() for one in said])
        facts = {k: v for k, v in known.items() if k != "run"}
        more = {"address": address, "d_sae": FEATURES}
        store.commit(address, run, FEATURES, facts | more, [])
    store.refresh()
    return folder


async def _many(httpx: Any, address: str) -> dict:
    """Readers that look at a page for a while before the next; steering goes on beside them."""
    limits = httpx.Limits(max_connections=READERS + 4)
    steer = f"/api/steer?feature={quote(ADDRESSES[1])}/3&prompt=def&strength=0.5xmax"
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def reader(number: int) -> list[float]:
            found = []
            await asyncio.sleep(PAUSE * number / READERS)
            for turn in range(PAGES):
                began = time.perf_counter()
                path = f"/feature/{quote(ADDRESSES[number % 2])}/{number * PAGES + turn}"
                (await client.get(path)).raise_for_status()
                found.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE)
            return found

        async def steering() -> None:
            while True:
                (await client.get(steer)).raise_for_status()

        beside = asyncio.create_task(steering())
        all_of = await asyncio.gather(*map(reader, range(READERS)))
        beside.cancel()
    found = sorted(s for one in all_of for s in one)
    return {
        "command": f"a feature page, {READERS} readers that turn a page every {PAUSE:g} s, steering",
        "tokens": 0, "seconds": found[len(found) // 2], "requests": len(found),
        "p95_seconds": found[int(len(found) * 0.95)],
    }  # fmt: skip
