"""Serving, and the stores that are looked at."""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from filelock import FileLock

from gemscope.errors import InputError
from gemscope.features import Store

from ._app import create_app
from ._first import Making, beside, first_folder, forget
from ._limits import Limits
from ._protocol import LONGEST, Telling
from ._security import Access
from ._workbench import Workbench

_STOPPED = 130
_GRAPHS = (".safetensors", ".json")


def open_workbench(
    stores: Sequence[Path],
    *,
    model: str | None = None,
    limits: Limits = Limits(),
    reports: Path | None = None,
) -> Workbench:
    """A workbench on `stores`, among which may be files of graphs; without any store on one of the
    miniature, which is made beside it if it is not there yet.
    """
    graphs = [path for path in stores if path.suffix in _GRAPHS and not path.is_dir()]
    for path in graphs:
        if not path.is_file():
            raise InputError(f"no file {path}: give a graph that gemscope trace wrote")
    stores = [path for path in stores if path not in graphs]
    if reports is not None and not reports.is_dir():
        raise InputError(f"no folder {reports}: give one with reports of gemscope eval")
    if stores:
        opened = [Store.open(path) for path in stores]
        return Workbench(opened, model=model, limits=limits, reports=reports, graphs=graphs)
    folder = first_folder()
    bench = Workbench([_sound(folder)], model=model, limits=limits, reports=reports, graphs=graphs)
    making = Making(folder)
    if making.told() is not None:
        bench.making = making
        making.start()
    return bench


def _sound(folder: Path) -> Store:
    """The store in `folder`; one that cannot be read is put aside, notes and all, for a new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(beside(folder, "opening.lock")):
        try:
            store = Store.create(folder)
            store.dictionaries()
        except InputError as mistake:
            if not folder.is_dir():
                raise
            aside = folder.with_name(f"{folder.name}.damaged-{time.strftime('%Y%m%d%H%M%S')}")
            folder.rename(aside)
            forget(folder)
            print(f"gemscope: {mistake}; put aside as {aside}", file=sys.stderr, flush=True)
            store = Store.create(folder)
    return store


def configured(app: FastAPI) -> uvicorn.Config:
    """How `app` is served."""
    return uvicorn.Config(
        app, log_level="warning", server_header=False, date_header=False, limit_concurrency=256,
        timeout_graceful_shutdown=2, http=Telling, h11_max_incomplete_event_size=LONGEST,
    )  # fmt: skip


def run(bench: Workbench, access: Access, listening: socket.socket) -> None:
    """Serve until stopped by Ctrl-C or a signal."""
    app = create_app(bench, access)
    # uvicorn closes what is open and then raises the signal again, for whoever handled it before.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        uvicorn.Server(configured(app)).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        if bench.making is not None:
            bench.making.end()
    if not app.state.ended:
        # Work that does not heed its stop would hold the interpreter's end up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STOPPED)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
