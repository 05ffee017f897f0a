"""Export, import and validation: one door for every format."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemscope.errors import InputError, did_you_mean
from gemscope.features import Store

from . import _catalog, _delphi, _neuronpedia_in, _parquet, _saedashboard
from ._catalog_out import LOST as CATALOG_LOST
from ._catalog_out import LOST_BARE, write_catalog
from ._files import check_target
from ._guess import format_of
from ._incoming import Imported, bring_in
from ._labels import Incoming, Problem
from ._measured import Progress, Selection, measure
from ._neuronpedia_out import LOST as NEURONPEDIA_LOST
from ._neuronpedia_out import write_neuronpedia

WRITTEN = ("catalog", "neuronpedia", "delphi", "parquet")
"""Formats that are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What only some formats have."""

    bare: bool = False
    """Catalog: a plain list with the field's keys alone."""
    vectors: bool = False
    """Neuronpedia and Parquet: decoder vectors too."""
    window: int = 128
    """Neuronpedia: tokens of an activation; 0 for whole contexts."""
    splits: int = _delphi.SPLITS
    """delphi: files of a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export did."""

    format: str
    to: str
    dictionaries: list[str]
    features: int
    lost: list[str]
    """What the store knows of these features and the format does not hold."""

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def export(
    store: Store,
    addresses: Sequence[str],
    to: Path,
    *,
    format: str,
    selection: Selection = Selection(),
    options: Options = Options(),
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Exported:
    """Write dictionaries of a store to `to`, whole or not at all."""
    if format not in WRITTEN:
        raise InputError(
            f"no format {format!r} to write: {', '.join(WRITTEN)}; {did_you_mean(format, WRITTEN)}"
        )
    _check(options)
    check_target(to, force=force)
    measured = measure(store, addresses, selection)
    lost: tuple[str, ...]
    if format == "catalog":
        lost = LOST_BARE if options.bare else CATALOG_LOST
        count = write_catalog(to, measured, bare=options.bare, force=force, progress=progress)
    elif format == "neuronpedia":
        lost = NEURONPEDIA_LOST
        count = write_neuronpedia(
            to, measured, vectors=options.vectors, window=options.window, force=force,
            progress=progress,
        )  # fmt: skip
    elif format == "delphi":
        count, told = _delphi.write_delphi(
            to, measured, splits=options.splits, force=force, progress=progress
        )
        lost = tuple(told)
    else:
        lost = _parquet.LOST[: 1 if options.vectors else None]
        count = _parquet.write_parquet(
            to, measured, vectors=options.vectors, force=force, progress=progress
        )
    return Exported(
        format=format,
        to=str(to),
        dictionaries=[one.address for one in measured],
        features=count,
        lost=list(lost),
    )


def import_labels(
    store: Store,
    path: Path,
    *,
    format: str | None = None,
    addresses: Sequence[str] = (),
    author: str | None = None,
    skip_unknown: bool = False,
    statistics: bool = False,
) -> Imported:
    """Add the labels in `path` to a store; nothing that is there is changed.

    `author` signs labels for which the file names none; by default the file's name does. With
    `statistics` what Neuronpedia or SAEDashboard measured, and their examples, are kept beside the
    store's own.
    """
    kind = format_of(path, format)
    if statistics and kind not in ("neuronpedia", "saedashboard"):
        raise InputError(f"--statistics is for neuronpedia and saedashboard, and {path} is {kind}")
    rows = None
    if kind == "catalog":
        incoming = _catalog.incoming(_catalog.read_catalog(path), author or path.name)
    elif kind == "neuronpedia":
        incoming = _neuronpedia_in.checked(path, everything=statistics)
        rows = partial(_neuronpedia_in.measurements, path)
    elif kind == "parquet":
        incoming = _parquet.checked(path)
    elif kind == "saedashboard":
        incoming = _saedashboard.read_batches(path)
        _catalog.refuse(path, incoming.problems)
        rows = partial(_saedashboard.measurements, path)
        if not statistics:
            incoming.lost.append("tables, histograms and examples: --statistics keeps them")
    else:
        raise InputError(
            f"{path} is a cache of activations, without labels; give --activations FOLDER to "
            "write it as a folder of activations by feature"
        )
    return bring_in(
        store, incoming, path, addresses=addresses, skip_unknown=skip_unknown,
        measurements=rows if statistics else None,
    )  # fmt: skip


def validate(path: Path, *, format: str | None = None) -> tuple[str, list[Problem]]:
    """The format of `path` and everything that is wrong with it, each with its place."""
    kind = format_of(path, format)
    try:
        return kind, _problems(path, kind)
    except InputError as error:
        # Nothing after what cannot be read at all is known.
        return kind, [Problem("", str(error))]


def _problems(path: Path, format: str) -> list[Problem]:
    if format == "catalog":
        return _catalog.read_catalog(path).problems
    found = Incoming(format=format)
    if format == "neuronpedia":
        found = _neuronpedia_in.read_neuronpedia(path, everything=True)
    elif format == "parquet":
        found = _parquet.read_parquet(path)
    elif format == "saedashboard":
        found = _saedashboard.read_batches(path)
    else:
        for module in _delphi.modules(path):
            _delphi.read_delphi(module)
    return found.problems


def _check(options: Options) -> None:
    if options.window < 0:
        raise InputError(f"a window of {options.window} tokens is none; 0 gives whole contexts")
    if not 1 <= options.splits <= 10_000:
        raise InputError(f"{options.splits} splits cannot be written: 1 to 10000")
