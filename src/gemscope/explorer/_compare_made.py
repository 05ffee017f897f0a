"""Comparisons under way and made: each once, while somebody waits for it."""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from gemscope import relate
from gemscope.errors import InputError
from gemscope.features import Activations, Source, Store, described
from gemscope.relate import Comparison, Peak

from ._compare_sides import Side, check, source
from ._workbench import Workbench
from ._worker import Busy, Cancelled, Worker

TOP = 20
"""Features in the tables, of each side."""
_KEPT = 12
"""Comparisons that stay in memory."""
_LEFT = 20.0
"""Seconds without a question after which nobody is thought to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One comparison."""

    address: str
    sides: tuple[Side, Side]
    tokens: int

    @property
    def key(self) -> str:
        """The same for the same question."""
        # Of indexed text all is taken, so the number of tokens does not matter.
        tokens = 0 if self.sides[0].kind == "indexed" else self.tokens
        return hashlib.sha256(
            json.dumps([self.address, tokens, *(s.key for s in self.sides)]).encode()
        ).hexdigest()


@dataclass(frozen=True, slots=True)
class Made:
    """A comparison, and words for features."""

    one: Comparison
    explanations: dict[int, str]
    contexts: dict[int, dict[str, Peak]]
    """By feature and text, the strongest token of features in the tables."""

    def csv(self) -> bytes:
        """Every feature, as `gemscope compare --csv` writes it."""
        extra = {f: {"explanation": self.explanations.get(f, "")} for f in range(len(self.one.q))}
        with TemporaryDirectory(prefix="gemscope-compare-") as folder:
            file = Path(folder) / "compared.csv"
            relate.write_csv([self.one], file, extra)
            return file.read_bytes()


@dataclass(slots=True)
class Job:
    """One that is under way or made."""

    key: str
    task: "asyncio.Task[Made] | None" = None
    what: str = "reading the texts"
    done: int = 0
    total: int = 0
    seen: float = field(default_factory=time.monotonic)

    def heard(self, stop: Event) -> Callable[[str, int, int], None]:
        """What the model's pass calls after each batch; ends it if nobody waits."""

        def progress(_what: str, done: int, total: int) -> None:
            if stop.is_set() or time.monotonic() - self.seen > _LEFT:
                raise Cancelled
            self.what, self.done, self.total = "running the model", done, total

        return progress


class Comparisons:
    """Comparisons by what was asked."""

    def __init__(self, bench: Workbench, worker: Worker):
        self._bench, self._worker = bench, worker
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    async def ask(self, asked: Asked, wait: float) -> Made | Job:
        """The comparison, or after `wait` seconds how far it is."""
        job = self._jobs.get(asked.key) or self._begin(asked)
        assert job.task is not None
        until = time.monotonic() + wait
        while not job.task.done() and (left := until - time.monotonic()) > 0:
            job.seen = time.monotonic()
            await asyncio.wait({job.task}, timeout=min(left, 1.0))
        job.seen = time.monotonic()
        return job.task.result() if job.task.done() else job

    def _begin(self, asked: Asked) -> Job:
        check(asked.sides)
        self._bench.store_of(asked.address)
        under_way = sum(j.task is not None and not j.task.done() for j in self._jobs.values())
        if under_way >= self._bench.limits.waiting:
            raise Busy
        job = Job(asked.key)
        job.task = asyncio.create_task(self._make(asked, job))
        job.task.add_done_callback(lambda task: self._ended(job, task))
        self._jobs[asked.key] = job
        while len(self._jobs) > max(_KEPT, under_way + 1):
            old = next(k for k, j in self._jobs.items() if j.task is None or j.task.done())
            del self._jobs[old]
        return job

    def _ended(self, job: Job, task: "asyncio.Task[Made]") -> None:
        # A mistake is told to who asked, and forgotten: asked again, it is tried again.
        if task.cancelled() or task.exception() is not None:
            self._jobs.pop(job.key, None)

    async def _make(self, asked: Asked, job: Job) -> Made:
        store = self._bench.store_of(asked.address)
        a, b = asked.sides
        if a.kind == "indexed":
            job.what = "counting"
            return await run_in_threadpool(_from_index, store, asked)
        sources = [await run_in_threadpool(source, one) for one in (a, b)]
        job.what = "waiting for the model"
        made: Made = await self._worker.run(
            lambda stop: _with_model(self._bench, store, asked, sources, job, stop)
        )
        return made


def _from_index(store: Store, asked: Asked) -> Made:
    activations = store.activations(asked.address)
    if activations is None:
        raise InputError(
            f"the activations of {asked.address} were not kept, and indexed texts are compared by "
            "them; gemscope index --keep-activations keeps them"
        )
    documents = {s.name: _documents(activations, s.what) for s in asked.sides}
    a, b = documents.items()
    one = relate.compare_documents(activations, asked.address, a, b)
    return _made(one, store, activations, store.tokenizer(asked.address), documents)


def _documents(activations: Activations, name: str) -> np.ndarray:
    """Numbers of the documents of a text, int64."""
    text = activations.text
    if name not in text.sources:
        raise InputError(f"no text {name!r} in this index: it has {', '.join(text.sources)}")
    return np.flatnonzero(text.source == text.sources.index(name))


def _with_model(
    bench: Workbench, store: Store, asked: Asked, sources: list[Source], job: Job, stop: Event
) -> Made:
    model = bench.model_of([asked.address])
    sae = bench.dictionary(asked.address).to(model.device)
    model.check(sae)
    with relate.collected(
        model, sae, sources, None, address=asked.address, tokens=asked.tokens,
        progress=job.heard(stop),
    ) as found:  # fmt: skip
        job.what = "counting"
        (one,) = relate.compare_sides(found, asked.address, sources)
        documents = {s.name: _documents(found, s.name) for s in sources}
        return _made(one, store, found, model.tokenizer, documents)


def _made(
    one: Comparison, store: Store, activations: Activations, tokenizer: Any,
    documents: dict[str, np.ndarray],
) -> Made:  # fmt: skip
    fires = np.flatnonzero(one.fires).tolist()
    said = described(store, [(one.address, feature) for feature in fires])
    contexts: dict[int, dict[str, Peak]] = {}
    for side in "ab":
        for feature in one.more_in(side, TOP, q=1.0):
            for name, rows in documents.items():
                found = relate.peaks(
                    activations, one.address, feature, tokenizer, documents=rows, count=1
                )
                if found:
                    contexts.setdefault(feature, {})[name] = found[0]
    return Made(one, {feature: text for (_, feature), (text, _) in said.items()}, contexts)
