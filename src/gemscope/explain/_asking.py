"""Requests, each asked once: from the replies that are kept, or several at a time."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from ._chat import Chat, Halted, Reply, Request, Stopped
from ._replies import Replies

T = TypeVar("T")

_LOOK_EVERY = 0.1
_LAST_WAIT = 5.0
"""Seconds that requests under way are given to be answered when a run ends."""


@dataclass(slots=True)
class Counts:
    """What was asked."""

    asked: int = 0
    kept: int = 0
    """Answered before, and so not asked."""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class Asker:
    """A model and the replies it gave; any thread may ask."""

    def __init__(self, chat: Chat, replies: Replies, stopping: Callable[[], bool] = lambda: False):
        self.chat, self.replies, self.stopping = chat, replies, stopping
        self.counts = Counts()
        self._lock = threading.Lock()
        self._under_way: dict[str, threading.Event] = {}
        # Features are worked on by one pool and wait for requests in the other.
        size = max(1, chat.concurrency)
        self._requests = ThreadPoolExecutor(size, thread_name_prefix="request")
        self._features = ThreadPoolExecutor(size, thread_name_prefix="feature")

    def ask(self, request: Request) -> Reply:
        """The reply to one request."""
        return self.ask_all([request])[0]

    def ask_all(self, requests: Iterable[Request]) -> list[Reply]:
        """The replies, in the order of the requests."""
        futures = []
        for request in requests:
            kept = self.replies.find(request)
            futures.append(kept or self._requests.submit(self._ask, request))
            with self._lock:
                self.counts.kept += kept is not None
        return [one if isinstance(one, Reply) else one.result() for one in futures]

    def _ask(self, request: Request) -> Reply:
        key = request.key(self.replies.at, self.replies.model)
        with self._lock:
            other = self._under_way.get(key)
            if other is None:
                self._under_way[key] = threading.Event()
        if other is not None:  # two features may ask the same: one of them does
            other.wait()
            if (kept := self.replies.find(request)) is not None:
                return kept
            raise Halted
        try:
            if (kept := self.replies.find(request)) is not None:
                return kept
            began = time.monotonic()
            reply = self.chat.answer(request)
            if not reply.created:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                reply = replace(reply, created=now)
            self.replies.keep(request, reply)
            with self._lock:
                self.counts.asked += 1
                self.counts.tokens_in += reply.tokens_in
                self.counts.tokens_out += reply.tokens_out
                self.counts.seconds += time.monotonic() - began
            return reply
        finally:
            with self._lock:
                self._under_way.pop(key).set()

    def each(self, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
        """Results of jobs that ask, as they are done, several at a time.

        Jobs are taken one by one, so what they hold is in memory for a few of them. Where a job
        fails or the run is stopped, requests under way are waited for a little, so that their
        answers are kept.
        """
        running: set[Future[T]] = set()
        try:
            more = True
            while more or running:
                while more and len(running) < 2 * max(1, self.chat.concurrency):
                    job = next(jobs, None)
                    more = job is not None
                    if job is not None:
                        running.add(self._features.submit(job))
                    if self.stopping():
                        raise Stopped
                done, running = wait(running, _LOOK_EVERY, FIRST_COMPLETED)
                for one in done:
                    yield one.result()
                if self.stopping():
                    raise Stopped
        except BaseException:
            self._wind_up(running)
            raise

    def json(self, prices: tuple[float, float] | None = None) -> dict[str, int | float]:
        """What was asked, and its price where those of a million tokens are given."""
        c = self.counts
        out: dict[str, int | float] = {
            "requests": c.asked, "kept": c.kept, "tokens_in": c.tokens_in,
            "tokens_out": c.tokens_out, "seconds": round(c.seconds, 1),
        }  # fmt: skip
        if prices:
            out["price"] = (c.tokens_in * prices[0] + c.tokens_out * prices[1]) / 1e6
        return out

    def close(self) -> None:
        """End the threads; replies stay open."""
        self._requests.shutdown(wait=False, cancel_futures=True)
        self._features.shutdown(wait=False, cancel_futures=True)

    def _wind_up(self, running: set[Future[Any]]) -> None:
        for one in running:
            one.cancel()
        self._requests.shutdown(wait=False, cancel_futures=True)
        wait(running, _LAST_WAIT)
        self.chat.halt()
