"""Several artefacts at a time on the cores of a processor.

A narrow artefact's step is many short operations: splitting each of them over all cores costs more
in waiting than it saves, and far more when another program holds one of the cores. So where there
are enough artefacts, each worker takes whole ones and computes on one core.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


class Workers:
    """A pool with a worker for each thread that torch would use, kept between steps."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def each(self, work: Callable[[list[int]], None], banks: Sequence[list[int]]) -> None:
        """`work` on every bank; on several at a time where there are enough."""
        if self._threads == 1 or len(banks) < self._threads or torch.cuda.is_available():
            for bank in banks:
                work(bank)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, initializer=_alone)
        # The products' library has one setting for all threads, so it is set around the work.
        torch.set_num_threads(1)
        try:
            # The longest first, so that none is left for the end.
            ordered = sorted(banks, key=len, reverse=True)
            for done in [self._pool.submit(_without_gradients, work, bank) for bank in ordered]:
                done.result()
        finally:
            torch.set_num_threads(self._threads)


def _alone() -> None:
    torch.set_num_threads(1)


def _without_gradients(work: Callable[[list[int]], None], bank: list[int]) -> None:
    with torch.no_grad():  # a setting of each thread
        work(bank)
