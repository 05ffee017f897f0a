"""Figures of artefacts, from whoever measured them: reports, their makers, the index of a store.

Reports of `gemscope eval` come first, the newest of an address; then what makers published, then
what an index counted. Figures of one source belong together: they are of one text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gemscope import hub

from ._workbench import Workbench

_NAMES = {"l0": "l0", "fvu": "fvu", "delta_loss": "delta_loss", "dead": "dead_fraction"}
"""What the scope calls a figure, and what reports call it."""
_LARGEST = 64 * 2**20
"""Bytes of a report that is read."""
_MOST = 500
"""Reports that are looked into."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one source says of one artefact; what it does not say is missing."""

    values: Mapping[str, float]
    source: str


class Measured:
    """Figures by address, and what could not be read."""

    def __init__(self, bench: Workbench):
        self._bench = bench
        self._reports: dict[Path, tuple[tuple[int, int], list[dict[str, Any]] | None]] = {}

    def of(self, entries: Sequence[hub.Entry]) -> dict[str, list[Figures]]:
        """The figures of each artefact, the source that comes first first."""
        reported, indexed = self._reported(), self._bench.known()
        silent: dict[str, float] | None = None
        out: dict[str, list[Figures]] = {}
        for entry in entries:
            found = []
            if record := reported.get(entry.address):
                found.append(Figures(_figures(record), _told(record)))
            if said := _published(entry):
                found.append(said)
            if facts := indexed.get(entry.address):
                silent = self._silent() if silent is None else silent
                values = {"l0": facts.get("l0"), "dead": silent.get(entry.address)}
                found.append(Figures(_finite(values), f"index, {facts['tokens']:,} tokens"))
            out[entry.address] = [f for f in found if f.values]
        return out

    def addresses(self) -> list[str]:
        """What the reports are about."""
        return list(self._reported())

    def wrong(self) -> list[str]:
        """Names of reports that cannot be read."""
        self._reported()
        wrong = [f for f, (_, rows) in self._reports.items() if rows is None and f.is_file()]
        return sorted("/".join(f.parts[-2:]) for f in wrong)

    def _silent(self) -> dict[str, float]:
        """The share of features that never fired when they were indexed."""
        out: dict[str, float] = {}
        for store in self._bench.stores:
            for address, rows in store.figures().items():
                out.setdefault(address, float((rows[:, 0] == 0).mean()))
        return out

    def _reported(self) -> dict[str, dict[str, Any]]:
        """Of each address the newest record."""
        folder = self._bench.reports
        if folder is None:
            return {}
        files = sorted([*folder.glob("report.json"), *folder.glob("*/report.json")])[:_MOST]
        newest: dict[str, dict[str, Any]] = {}
        for file in files:
            for record in self._read(file) or []:
                before = newest.get(record["address"])
                if before is None or _time(record) >= _time(before):
                    newest[record["address"]] = record
        return newest

    def _read(self, file: Path) -> list[dict[str, Any]] | None:
        """The records of a report, kept until it changes; None if it is none."""
        try:
            now = file.stat()
            state = (now.st_mtime_ns, now.st_size)
            if (kept := self._reports.get(file)) and kept[0] == state:
                return kept[1]
            rows = json.loads(file.read_text("utf-8")) if now.st_size <= _LARGEST else None
        except (OSError, ValueError, RecursionError):
            state, rows = (0, 0), None
        whole = isinstance(rows, list) and all(
            isinstance(row, dict) and isinstance(row.get("address"), str) for row in rows
        )
        found = [_needed(row) for row in rows or []] if whole else None
        self._reports[file] = (state, found)
        return found


def first(found: Sequence[Figures], name: str) -> tuple[float, str] | None:
    """A figure and its source, of the source that comes first among those that have it."""
    return next(((f.values[name], f.source) for f in found if name in f.values), None)


def _needed(record: dict[str, Any]) -> dict[str, Any]:
    made = record.get("provenance")
    kept = {name: record.get(name) for name in ("address", "tokens", *_NAMES.values())}
    return kept | {"time": made.get("time") if isinstance(made, dict) else None}


def _time(record: dict[str, Any]) -> str:
    return str(record["time"] or "")


def _told(record: dict[str, Any]) -> str:
    tokens = record["tokens"]
    count = f", {tokens:,} tokens" if isinstance(tokens, int) else ""
    return f"report of {_time(record)[:10] or 'no date'}{count}"


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    return _finite({ours: record.get(theirs) for ours, theirs in _NAMES.items()})


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


@cache
def _published_at(address: str, _model: str) -> Figures | None:
    said = hub.published(hub.locate(address, download=False))
    if said is None:
        return None
    # An L0 counted above another bar than zero, or a figure of one sentence, is none of these.
    if "l0_above" in said or "text" in said:
        return None
    return Figures(_figures(said), str(said.get("source", "its makers")))


@cache
def _makers() -> frozenset[str]:
    """Releases whose makers published figures that can stand here."""
    return frozenset({hub.BUNDLED_RELEASE})


def _published(entry: hub.Entry) -> Figures | None:
    if entry.release not in _makers():
        return None
    return _published_at(entry.address, entry.model)
