"""Many readers at once, and how long they wait."""

import asyncio
import statistics
import time
from urllib.parse import quote

import explorer
import pytest
from fastapi.testclient import TestClient

from gemscope.explorer import Limits, Workbench, _steer, create_app
from gemscope.explorer._steer_record import steered
from gemscope.explorer._worker import Cancelled
from gemscope.features import Store

httpx = pytest.importorskip("httpx2", reason="the client of starlette's tests is not installed")
pytestmark = pytest.mark.slow
READERS, EACH = 50, 4
WORDS = "def parse(path):\n    return open(path).read()\n" * 16


@pytest.fixture(scope="module")
def running(small_store, tmp_path_factory):
    """The address of a server in a process of its own, as readers meet it."""
    serving = explorer.Serving(small_store, cache=tmp_path_factory.mktemp("cache"))
    yield serving.address
    serving.stop()


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def readers(address, paths):
    """Seconds and status of each answer, of `READERS` readers that go from page to page."""
    limits = httpx.Limits(max_connections=READERS + 4, max_keepalive_connections=READERS + 4)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:

        async def one(number):
            found = []
            for turn in range(EACH):
                began = time.perf_counter()
                answer = await client.get(paths[(number * EACH + turn) % len(paths)])
                found.append((time.perf_counter() - began, answer.status_code))
                # A reader looks at a page before the next.
                await asyncio.sleep(2)
            return found

        return [x for found in await asyncio.gather(*map(one, range(READERS))) for x in found]


async def steering(client, path, stop):
    """Steered continuations one after the other until told to stop; how many there were."""
    done = 0
    while not stop.is_set():
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        done += 1
    return done


def steer_path(address):
    return f"/api/steer?feature={quote(address)}/3&prompt=def&strength=0.5xmax&max_new_tokens=40"


def test_fifty_readers_while_features_are_steered(running, indexed):
    paths = [f"/feature/{quote(indexed[i % 2])}/{i}" for i in range(200)]

    async def scene(address):
        stop = asyncio.Event()
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            beside = asyncio.create_task(steering(client, steer_path(indexed[1]), stop))
            found = await readers(address, paths)
            stop.set()
            return found, await beside

    asyncio.run(readers(running, paths[:4]))  # what is prepared once
    found, times = asyncio.run(scene(running))
    assert {status for _, status in found} == {200}
    # The goal is 1 s on a machine that does nothing else, where the benchmark is run.
    assert percentile([s for s, _ in found], 0.95) < 3
    assert times > 0


def test_a_feature_page_costs_little(small_store, indexed, monkeypatch):
    """The goal is 100 ms; of a machine that does other things too, its own processor time."""
    from lancedb.background_loop import BackgroundEventLoop

    bench, calls = Workbench([Store.open(small_store)]), []
    bench.model()
    run = BackgroundEventLoop.run
    monkeypatch.setattr(
        BackgroundEventLoop, "run", lambda self, future: [calls.append(1), run(self, future)][1]
    )
    with TestClient(create_app(bench), base_url="http://localhost") as client:
        for address in indexed:
            client.get(f"/feature/{address}/0")
        spent, asked = [], []
        for i in range(1, 61):
            calls.clear()
            began = time.process_time()
            assert client.get(f"/feature/{indexed[0]}/{i}").status_code == 200
            spent.append(time.process_time() - began)
            asked.append(len(calls))
    assert percentile(spent, 0.95) < 0.1, statistics.median(spent)
    # Each hands the interpreter to another thread and back, which is long beside a model at work.
    assert statistics.median(asked) <= 4
    assert percentile(asked, 0.95) <= 16


def test_a_text_is_read_at_once(running, indexed):
    path = f"/api/feature/{quote(indexed[1])}/3/live?text="
    with httpx.Client(base_url=running, timeout=60) as client:
        found = []
        for i in range(8):
            began = time.perf_counter()
            answer = client.get(f"{path}{quote(WORDS)}{i}").raise_for_status()
            found.append(time.perf_counter() - began)
            assert 190 < len(answer.json()["tokens"]) < 210
    assert min(found) < 0.3


def test_a_reader_who_leaves_ends_the_steering(small_store, indexed, monkeypatch):
    ended = []

    def watched(*given):
        try:
            steered(*given)
        except BaseException as error:
            ended.append(type(error))
            raise
        ended.append(None)

    monkeypatch.setattr(_steer, "steered", watched)
    short, long = (
        steer_path(indexed[1]).replace("tokens=40", f"tokens={n}") for n in (1, Limits().new_tokens)
    )
    with explorer.served(small_store) as at, httpx.Client(base_url=at, timeout=300) as client:
        client.get(short).raise_for_status()  # the model is loaded
        with client.stream("GET", long) as answer:
            next(answer.iter_lines())
        client.get(short).raise_for_status()
    assert ended == [None, Cancelled, None]


def test_the_first_page_comes_soon(tmp_path, small_store):
    """The goal is 3 s on a machine that does nothing else, where the benchmark is run."""
    found = []
    for _ in range(2):
        began = time.monotonic()
        serving = explorer.Serving(small_store, cache=tmp_path)
        try:
            with httpx.Client(timeout=60) as client:
                assert client.get(serving.address).status_code == 200
            found.append(time.monotonic() - began)
        finally:
            serving.stop()
    assert min(found) < 12
