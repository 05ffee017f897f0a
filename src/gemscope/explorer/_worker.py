"""Model work: off the event loop, one piece after the other, in a bounded queue.

Two pieces side by side would each take twice as long. The model's products use all cores but one:
pages need one too, and threads of a product wait for each other, so that with fewer cores than
threads free for them, each of thousands of products waits until the last thread had its turn. On
two cores that are busy otherwise, 40 steered tokens took 7.7 s with two threads and 0.4 s with one.
"""

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from ._limits import Limits


class Busy(Exception):  # noqa: N818
    """More work waits than the limits allow."""


class Cancelled(Exception):  # noqa: N818
    """Nobody waits for this work any more."""


class _Piece:
    """One piece of work, and who is told how it ended: exactly once, from any thread."""

    def __init__(self, work: Callable[[], Any], ended: Callable[[Any, BaseException | None], None]):
        self.work, self._ended = work, ended
        self.stop = threading.Event()
        self._once = threading.Lock()

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        if self._once.acquire(blocking=False):
            self._ended(result, error)


class Worker:
    """Runs functions that take a `stop` event, which is set when nobody waits for them any more."""

    def __init__(self, limits: Limits, begin: Callable[[], None] = lambda: None):
        self._limits, self._begin = limits, begin
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._live: set[_Piece] = set()
        self._lock = threading.Lock()
        self._closed = False
        # A daemon: what does not heed its stop must not keep the process alive.
        self._thread = threading.Thread(target=self._go, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pieces of work that are under way or wait."""
        return len(self._live)

    async def run(self, work: Callable[[threading.Event], Any]) -> Any:
        """What `work` returns. Cancelled or too slow, the work is told to stop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        stop = self._submit(work, _soon(loop, settle))
        try:
            return await asyncio.wait_for(future, self._limits.seconds)
        finally:
            stop.set()

    async def stream(
        self, work: Callable[[threading.Event, Callable[[Any], None]], None]
    ) -> AsyncIterator[Any]:
        """What `work` hands to its second argument, piece by piece, as it comes."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[bool, Any, BaseException | None]] = asyncio.Queue()
        put = _soon(loop, lambda piece, _: pieces.put_nowait((False, piece, None)))
        end = _soon(loop, lambda _, error: pieces.put_nowait((True, None, error)))

        stop = self._submit(lambda stop: work(stop, lambda piece: put(piece, None)), end)
        try:
            until = loop.time() + self._limits.seconds
            while True:
                last, piece, error = await asyncio.wait_for(pieces.get(), until - loop.time())
                if error is not None:
                    raise error
                if last:
                    return
                yield piece
        finally:
            stop.set()

    def close(self, seconds: float = 2.0) -> bool:
        """Stop what is under way, drop what waits and take no more; whether all ended in time."""
        with self._lock:
            self._closed = True
            live = list(self._live)
        for piece in live:
            piece.stop.set()
        self._pieces.put(None)
        self._thread.join(seconds)
        for piece in live:
            piece.end(error=Cancelled())
        return not self._thread.is_alive()

    def _submit(
        self,
        work: Callable[[threading.Event], Any],
        ended: Callable[[Any, BaseException | None], None],
    ) -> threading.Event:
        piece = _Piece(lambda: work(piece.stop), ended)
        with self._lock:
            if self._closed:
                raise Cancelled
            if len(self._live) >= self._limits.waiting:
                raise Busy
            self._live.add(piece)
        self._pieces.put(piece)
        return piece.stop

    def _go(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                if piece.stop.is_set():
                    raise Cancelled
                self._begin()
                result, error = piece.work(), None
            except BaseException as raised:
                # Whoever waits gets it; this thread goes on with the next piece.
                result, error = None, raised
            with self._lock:
                self._live.discard(piece)
            piece.end(result, error)


def leave_a_core() -> None:
    """Let this thread's products use all cores but one; fewer if that was asked for before."""
    import torch

    most = max(1, (os.cpu_count() or 2) - 1)
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)


def _soon(
    loop: asyncio.AbstractEventLoop, heard: Callable[[Any, BaseException | None], None]
) -> Callable[[Any, BaseException | None], None]:
    """`heard` in the thread of `loop`; nothing once that is closed."""

    def call(value: Any, error: BaseException | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(heard, value, error)

    return call
