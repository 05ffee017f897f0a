"""How long readers of the explorer wait: for the first page, for one page after the other, and
fifty at once while features are steered.

`python benchmarks/run.py --keep explorer` writes the records.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

ADDRESSES = tuple(f"miniature/resid_post_all/layer_{n}_width_384_l0_small" for n in (2, 3))
TOKENS, READERS, PAGES, PAUSE = 20_000, 50, 6, 2.0


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
    one = quote(ADDRESSES[1])
    cases = {
        "a feature page": lambda i: f"/feature/{one}/{i}",
        "a text of 14 tokens read": lambda i: f"/?sae={one}&text={text}{i}",
        "a search for a word": lambda i: f"/search?q=return{i % 3}",
        "the scope of 1,439 dictionaries": lambda _: "/scope?release=gemma-scope-2-27b-it&colour=l0",
    }  # fmt: skip
    with httpx.Client(base_url=address, timeout=60) as client:
        for name, path in cases.items():
            found = []
            for i in range(65):
                began = time.perf_counter()
                client.get(path(i)).raise_for_status()
                found.append(time.perf_counter() - began)
            found = sorted(found[5:])
            yield {"command": name, "tokens": 0, "seconds": found[len(found) // 2],
                   "p95_seconds": found[int(len(found) * 0.95)]}  # fmt: skip


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
