"""The queue of model work: bounded, in order, and left by those who left."""

import asyncio
import threading
import time

import pytest

from gemscope.errors import InputError
from gemscope.explorer import Limits
from gemscope.explorer._worker import Busy, Cancelled, Worker


def in_worker(scene, **limits):
    async def whole():
        worker = Worker(Limits(**limits))
        try:
            return await scene(worker)
        finally:
            worker.close()

    return asyncio.run(whole())


def test_a_full_queue_refuses():
    async def scene(worker):
        go = threading.Event()
        first = [asyncio.create_task(worker.run(lambda stop: go.wait(20))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert worker.waiting == 2
        with pytest.raises(Busy):
            await worker.run(lambda stop: None)
        go.set()
        assert await asyncio.gather(*first) == [True, True]
        assert await worker.run(lambda stop: "again") == "again"

    in_worker(scene, waiting=2)


def test_work_that_takes_too_long_is_told_to_stop():
    async def scene(worker):
        stops = []
        with pytest.raises(TimeoutError):
            await worker.run(lambda stop: stops.append(stop.wait(20)))
        with pytest.raises(TimeoutError):
            await anext(worker.stream(lambda stop, put: stop.wait(20)))
        assert await worker.run(lambda stop: "next") == "next"
        assert stops == [True]

    in_worker(scene, seconds=0.3)


def test_what_nobody_waits_for_is_not_begun():
    async def scene(worker):
        go, ran = threading.Event(), []
        first = asyncio.create_task(worker.run(lambda stop: go.wait(20)))
        second = asyncio.create_task(worker.run(lambda stop: ran.append(1)))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        go.set()
        await first
        await worker.run(lambda stop: None)
        assert (ran, worker.waiting) == ([], 0)

    in_worker(scene)


def test_a_stream_hands_on_pieces_and_mistakes():
    def wrong(stop, put):
        put(1)
        put(2)
        raise InputError("of the work")

    async def scene(worker):
        seen = []

        async def heard():
            async for piece in worker.stream(wrong):
                seen.append(piece)

        with pytest.raises(InputError, match="of the work"):
            await heard()
        assert seen == [1, 2]

    in_worker(scene)


def test_closing_ends_what_waits_and_what_runs():
    async def scene(worker):
        running = asyncio.create_task(worker.run(lambda stop: stop.wait(20)))
        waiting = asyncio.create_task(worker.run(lambda stop: None))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        assert worker.close()
        assert time.monotonic() - began < 2
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert isinstance(results[1], Cancelled)
        with pytest.raises(Cancelled):
            await worker.run(lambda stop: None)

    in_worker(scene)
