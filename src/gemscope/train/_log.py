"""Metrics on their way to a tracking service, beside the run's own files.

Neither service is a dependency: what is asked for and missing is said before anything is loaded.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from gemscope.errors import InputError

from ._config import TrainConfig
from ._trainer import Progress

_PROJECT = "gemscope"
_SENT = ("loss", "fvu", "l0", "target", "dead", "kl")


@contextmanager
def logging(config: TrainConfig) -> Iterator["Logs"]:
    """The services that `config.log` names, closed in the end however it comes."""
    logs = Logs(config)
    try:
        yield logs
    finally:
        logs.finish()


class Logs:
    """The services that `config.log` names."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.services = {name: _module(name) for name in config.log}
        self._open: dict[str, ModuleType] = {}

    def _begin(self, began: str) -> None:
        folder = Path(self.config.out).resolve()
        name = f"{folder.name}-{began}".replace(":", "").replace("+0000", "")
        given: dict[str, Any] = {
            "project": _PROJECT,
            "name": name,
            "config": self.config.model_dump(mode="json"),
            "resume": "allow",
        }
        for service, module in self.services.items():
            own = {"id": name, "dir": str(folder)} if service == "wandb" else {}
            try:
                module.init(**given, **own)
            except Exception as error:
                raise InputError(
                    f"{service} did not start: {' '.join(str(error).split())}; set it up, or leave "
                    "it out of log"
                ) from error
            self._open[service] = module

    def before(
        self, report: Callable[[Progress], None], began: str, every: int
    ) -> Callable[[Progress], None]:
        """`report`, after sending the standings that are due: those of every `every` steps.

        The run of the services is known by the time it `began`, and goes on when the run does.
        """
        if not self.services:
            return report
        self._begin(began)

        def both(progress: Progress) -> None:
            if progress.step % every == 0 or progress.step == progress.steps:
                self._send(progress)
            report(progress)

        return both

    def finish(self) -> None:
        """Close what is open."""
        for service, module in list(self._open.items()):
            self._try(service, module.finish)
        self._open = {}

    def _send(self, progress: Progress) -> None:
        told = _flat(progress)
        for service, module in list(self._open.items()):
            self._try(service, partial(module.log, told, step=progress.step))

    def _try(self, service: str, work: Callable[[], object]) -> None:
        # Everything is in the run's folder too: no failure of a service is worth a run.
        try:
            work()
        except Exception as error:
            self._open.pop(service, None)
            warnings.warn(
                f"{service} gets no more metrics: {error}; they go on in {self.config.out}/metrics",
                RuntimeWarning,
                stacklevel=2,
            )


def _flat(progress: Progress) -> dict[str, int | float]:
    """The standings as `NAME/fvu` and so on, which services draw side by side."""
    out: dict[str, int | float] = {"tokens": progress.tokens, "seconds": progress.seconds}
    for standing in progress.standings:
        for key in _SENT:
            if (value := getattr(standing, key)) is not None:
                out[f"{standing.name}/{key}"] = value
    return out


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"log names {name}, which is not installed: pip install 'gemscope[{name}]', or leave "
            "it out"
        ) from None
