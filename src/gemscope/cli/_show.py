"""What the verbs share: one JSON value on stdout, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def print_json(value: Any) -> None:
    """One JSON value, and nothing else, on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def console(*, stderr: bool = False) -> "Console":
    """A terminal, or plain text when redirected."""
    from rich.console import Console

    # A file or a pipe has no width of its own; an address should not be folded there.
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 120
    return Console(stderr=stderr, highlight=False, width=wide)


@contextmanager
def bar(*columns: "ProgressColumn") -> "Iterator[Progress]":
    """A bar on stderr, of which a user's mistake leaves nothing: it is told in one line."""
    from rich.progress import Progress

    progress = Progress(*columns, console=console(stderr=True))
    end = progress.stop
    progress.start()
    try:
        yield progress
    except InputError:
        progress.live.transient, end = True, progress.live.stop
        raise
    finally:
        end()


@contextmanager
def token_progress(
    units: Mapping[str, str] | None = None, *, unit: str = "tokens"
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with rate and time left, for callbacks of `(what, done, total)`.

    What is counted are tokens or another `unit`, or for some of `what` the units named. Counting
    that begins again gets a bar of its own.
    """
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<24}"),
        bars.BarColumn(bar_width=30),
        bars.TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    tasks: dict[str, bars.TaskID] = {}
    with bar(*columns) as progress:

        def update(what: str, done: int, total: int) -> None:
            of = (units or {}).get(what, unit)
            if what not in tasks or done < progress.tasks[tasks[what]].completed:
                tasks[what] = progress.add_task(what, total=total, rate="", unit=of)
            pace = next(t.speed for t in progress.tasks if t.id == tasks[what])
            speed = f"{pace:,.{0 if pace >= 10 else 1}f} {of}/s" if pace else ""
            progress.update(tasks[what], completed=done, rate=speed)

        yield update


def percent(share: float | None) -> str:
    """`0.0125` as `1.25%`."""
    return "-" if share is None or share != share else f"{share:.2%}"


def number(value: float | None, digits: int = 4) -> str:
    """A figure in at most `digits` significant digits."""
    return "-" if value is None or value != value else f"{value:.{digits}g}"
