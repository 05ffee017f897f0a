"""Ctrl-C and SIGTERM as something to ask about, so that a run can end where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The stop signals received while the context lasts; a second one of a kind acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, note)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
