"""`gemscope train`."""

import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._show import console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from gemscope.train import Floor, Progress, Standing, TrainConfig

_MOST = 20
"""Artefacts that are shown at once."""
_OFTEN, _SELDOM = 0.25, 10.0
"""Seconds between two pictures on a terminal, and between two lines anywhere else."""
_WINDOW = 30.0
"""Seconds of training over which speed is measured."""


def train_command(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in presets/.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as data.tokens=100000.")] = None,
    smoke_test: Annotated[bool, typer.Option("--smoke-test", help="The whole path in thirty small steps.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on from a checkpoint.")] = False,
) -> None:  # fmt: skip
    """Train dictionaries, many at once; run it again to go on."""
    # Before torch is loaded: large pages for large tensors save a fifth of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from gemscope import train

    chosen = train.read_config(config, set_)
    if smoke_test:
        wanted, chosen = chosen.model, _fresh(train.smoke_test(chosen))
        if chosen.model != wanted:
            print(f"{wanted} is not on this machine; the miniature stands in for it")
    try:
        with _watching(chosen) as view:
            folder = train.train(chosen, resume=resume, report=view.report, begun=view.begun)
    except train.Stopped as stopped:
        print(f"gemscope: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signum) from None
    first, count = folder / chosen.artefacts[0].name, len(chosen.artefacts)
    print(f"The artefact: {first}" if count == 1 else f"The {count} artefacts: {folder}")
    print(f"The report: {folder / 'report.html'}")
    print(f"Evaluate {'it' if count == 1 else 'one'}: gemscope eval {shlex.quote(str(first))}")


def _fresh(config: "TrainConfig") -> "TrainConfig":
    """The config, in a folder where no earlier smoke test is finished or under way."""
    count, folder = 1, Path(config.out)
    while folder.exists():
        count += 1
        folder = Path(f"{config.out}-{count}")
    return config.model_copy(update={"out": str(folder)})


@contextmanager
def _watching(config: "TrainConfig") -> Iterator["_View"]:
    """A table on a terminal's stderr, a line now and then where stderr is something else."""
    to = console(stderr=True)
    if not to.is_interactive:
        lines = _View(config, lambda view, p: _say(view.line(p)))
        lines.pause = _SELDOM
        count = len(config.artefacts)
        many = f"{count} artefacts" if count > 1 else "1 artefact"
        what = f"{config.steps:,} steps of {config.data.batch:,} tokens"
        lines.opening = f"training {many} of {config.model}: {what}"
        yield lines
        return

    from rich.live import Live

    with Live("loading the model and activations", console=to, auto_refresh=False) as live:
        try:
            yield _View(config, lambda view, p: live.update(view.table(p, to), refresh=True))
        except InputError:
            live.transient = True  # it is told in one line, of which nothing should distract
            raise


class _View:
    """What a run looks like from outside: kept at every step, shown now and then."""

    def __init__(self, config: "TrainConfig", show: "Callable[[_View, Progress], None]"):
        self.config, self.show, self.pause = config, show, _OFTEN
        self.pace = _Pace(config)
        self.floor: Floor | None = None
        self.opening: str | None = None
        self._next = 0.0
        self._order: list[str] = []
        self._ordered = 0.0

    def begun(self, floor: "Floor") -> None:
        """Training begins; a step takes `floor` at least."""
        self.floor = floor
        if self.opening:  # not before: a mistake is told in one line
            _say(self.opening)

    def report(self, progress: "Progress") -> None:
        """Take note of a step."""
        self.pace.add(progress)
        now = time.monotonic()
        if now < self._next and progress.step < progress.steps:
            return
        self.show(self, progress)
        # A terminal that draws slowly does not slow the training down by more than a twentieth.
        self._next = now + max(self.pause, 20 * (time.monotonic() - now))

    def facts(self, p: "Progress") -> list[str]:
        """Speed, time left and the distance to the floor, as far as they are known."""
        step = self.pace.step_seconds
        if step is None:
            return []
        left = _clock(self.pace.left(p))
        out = [f"{self.config.data.batch / step:,.0f} tokens/s"]
        out.append(f"ETA {left}" if p.step < p.steps else "finishing")
        if self.floor is not None:
            ratio = step / self.floor.seconds
            out.append(f"{ratio:.1f}x floor" if ratio < 100 else f"{ratio:,.0f}x floor")
        return out

    def line(self, p: "Progress") -> str:
        """Everything in one line."""
        parts = [f"step {p.step:,}/{p.steps:,}", *self.facts(p)]
        if len(p.standings) <= 3:
            one = len(p.standings) == 1
            parts += [("" if one else f"{s.name}: ") + _told(s) for s in p.standings]
        else:
            worst = max(p.standings, key=lambda s: s.fvu)
            off = max(p.standings, key=lambda s: abs(s.l0 / s.target - 1))
            dead = max(p.standings, key=lambda s: s.dead)
            best = min(s.fvu for s in p.standings)
            parts.append(f"FVU {best:.3f} to {worst.fvu:.3f} ({worst.name})")
            parts.append(f"L0 at worst {_l0(off)} ({off.name})")
            parts.append(f"dead up to {dead.dead:.1%} ({dead.name})" if dead.dead else "dead 0.0%")
        return "; ".join([*parts, _sections(p)])

    def table(self, p: "Progress", to: "Console") -> "RenderableType":
        """The picture on a terminal: nothing in it is wider than the terminal, or wraps."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width, height = to.size
        facts = "  ".join(self.facts(p))
        step = f"step {p.step:,}/{p.steps:,}"
        head = Table.grid(padding=(0, 2, 0, 0))
        bar = min(40, width - len(step) - len(facts) - 7)
        cells: list[RenderableType] = [Text(step, "bold", no_wrap=True)]
        if bar >= 4:
            cells.append(ProgressBar(p.steps, p.step, width=bar))
        head.add_row(*cells, Text(facts, no_wrap=True))
        body = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        body.add_column("artefact", no_wrap=True)
        for heading, least in (("loss", 7), ("FVU", 6), ("L0 / target", 12), ("dead", 6)):
            body.add_column(heading, justify="right", no_wrap=True, min_width=least)
        room = max(8, width - 40)
        for row in self._rows(p.standings, max(3, min(_MOST, height - 4))):
            if isinstance(row, str):
                body.add_row(Text(row if len(row) <= room else row.partition(",")[0], "dim"))
            else:
                cells = [f"{row.fvu:.3f}", _l0(row), f"{row.dead:.1%}"]
                body.add_row(Text(_end(row.name, room)), _loss(row), *cells)
        last = Text(_sections(p), "dim", no_wrap=True, overflow="ellipsis")
        return Group(head, body, last)

    def _rows(self, standings: "Sequence[Standing]", most: int) -> "list[Standing | str]":
        """All artefacts as configured, or the worst and the best and how many are between."""
        if len(standings) <= most:
            return list(standings)
        now = time.monotonic()
        if not self._order or now - self._ordered > 5:  # rows that jump cannot be read
            ranked = sorted(standings, key=lambda s: -s.fvu)
            self._order, self._ordered = [s.name for s in ranked], now
        by_name = {s.name: s for s in standings}
        ranked = [by_name[name] for name in self._order]
        worst, best = most // 2, (most - 1) // 2
        between = ranked[worst : len(ranked) - best]
        note = f"... {len(between)} between, FVU {between[-1].fvu:.3f} to {between[0].fvu:.3f}"
        return [*ranked[:worst], note, *ranked[len(ranked) - best :]]


class _Pace:
    """Time of a step over the last half minute, looks at held-out text apart."""

    def __init__(self, config: "TrainConfig"):
        self.every = config.evaluate.every if config.evaluate else None
        self.step_seconds: float | None = None
        self._look, self._busy = 0.0, 0.0
        self._before: tuple[int, float] | None = None
        self._window: deque[tuple[int, float]] = deque()

    def add(self, p: "Progress") -> None:
        """Take note of a step."""
        if self._before is not None:
            step, seconds = self._before
            spent = p.seconds - seconds
            if self.every and step % self.every == 0:
                usual = min(spent, self.step_seconds or 0.0)
                self._look, spent = spent - usual, usual
            self._busy += spent
        self._before = p.step, p.seconds
        self._window.append((p.step, self._busy))
        while len(self._window) > 2 and self._busy - self._window[1][1] > _WINDOW:
            self._window.popleft()
        first, busy = self._window[0]
        if p.step > first:
            self.step_seconds = max((self._busy - busy) / (p.step - first), 1e-9)

    def left(self, p: "Progress") -> float:
        """Seconds to the end, with the looks until then."""
        looks = p.steps // self.every - p.step // self.every if self.every else 0
        return (p.steps - p.step) * (self.step_seconds or 0.0) + looks * self._look


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _told(s: "Standing") -> str:
    return f"loss {_loss(s)}, FVU {s.fvu:.3f}, L0 {_l0(s)}, dead {s.dead:.1%}"


def _loss(s: "Standing") -> str:
    return f"{s.loss:.4f}" if abs(s.loss) < 100 else f"{s.loss:.4g}"


def _l0(s: "Standing") -> str:
    found = f"{s.l0:.1f}" if s.l0 < 1_000 else f"{s.l0:,.0f}"
    return f"{found} / {s.target:g}"


def _sections(p: "Progress") -> str:
    whole = sum(p.sections.values()) or 1.0
    return "time: " + ", ".join(f"{n} {spent / whole:.0%}" for n, spent in p.sections.items())


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _end(name: str, room: int) -> str:
    """The end of a name that is too long: what tells it from others is there."""
    return name if len(name) <= room else "…" + name[1 - room :]
