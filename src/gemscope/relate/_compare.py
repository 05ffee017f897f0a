"""How two texts differ in what fires: every feature, with documents as the units."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gemscope import corpus
from gemscope.errors import InputError
from gemscope.features import Activations, Source, named, sources_of

from ._counts import GroupCounts, group_counts, source_documents
from ._odds import LogOdds, benjamini_hochberg, log_odds

KEYS = ("feature", "density_a", "density_b", "log_odds", "low", "high", "q")
"""What a row of a comparison says, at least."""
MORE = ("p", "t", "cohens_h", "d", "fired_a", "fired_b", "documents_a", "documents_b")
"""What a full row says beside: see `Comparison`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two texts, one dictionary; every array is `[d_sae]`."""

    address: str
    a: GroupCounts
    b: GroupCounts
    odds: LogOdds
    q: Float[np.ndarray, " d_sae"]
    """False discovery rate (Benjamini and Hochberg) over the features that fire in either text."""

    @property
    def cohens_h(self) -> Float[np.ndarray, " d_sae"]:
        """Cohen's h of the densities: 0.2 is small, 0.5 medium, 0.8 large."""
        return 2 * (np.arcsin(np.sqrt(self.a.density)) - np.arcsin(np.sqrt(self.b.density)))

    @property
    def d(self) -> Float[np.ndarray, " d_sae"]:
        """The difference in standard deviations between documents: `t sqrt(1/m_a + 1/m_b)`."""
        return self.odds.t * np.sqrt(1 / self.a.documents + 1 / self.b.documents)

    @property
    def fires(self) -> np.ndarray:
        """Features that fire in either text, bool: those that are tested."""
        return (self.a.fired + self.b.fired) > 0

    @property
    def order(self) -> Int[np.ndarray, " d_sae"]:
        """Features from the one that speaks most surely for a to the one that does for b.

        By p-value, and among equals by the log odds ratio; what fires nowhere is in the middle.
        """
        sure = np.where(self.fires, -np.log(np.maximum(self.odds.p, 1e-300)), 0.0)
        side = np.sign(self.odds.t)
        return np.lexsort((np.arange(len(side)), -self.odds.value * self.fires, -side * sure))

    def more_in(self, side: str, count: int | None = None, *, q: float = 0.05) -> list[int]:
        """Significant features that are denser in `a` or in `b`, surest first."""
        order = self.order if side == "a" else self.order[::-1]
        sign = 1 if side == "a" else -1
        found = [int(f) for f in order if sign * self.odds.t[f] > 0 and self.q[f] <= q]
        return found[:count]

    def row(self, feature: int, *, full: bool = False) -> dict[str, Any]:
        """One feature as JSON: `KEYS`, and `MORE` with `full`."""
        columns = self._columns(full)
        return {name: _plain(values[feature]) for name, values in columns.items()}

    def rows(self, *, full: bool = False) -> list[dict[str, Any]]:
        """Every feature as JSON, in `order`."""
        columns = self._columns(full)
        return [
            {name: _plain(values[feature]) for name, values in columns.items()}
            for feature in self.order
        ]

    def _columns(self, full: bool) -> dict[str, np.ndarray]:
        out = {
            "feature": np.arange(len(self.q)),
            "density_a": self.a.density,
            "density_b": self.b.density,
            "log_odds": self.odds.value,
            "low": self.odds.low,
            "high": self.odds.high,
            "q": self.q,
        }
        if full:
            out |= {
                "p": self.odds.p,
                "t": self.odds.t,
                "cohens_h": self.cohens_h,
                "d": self.d,
                "fired_a": self.a.fired,
                "fired_b": self.b.fired,
                "documents_a": self.a.documents_fired,
                "documents_b": self.b.documents_fired,
            }
        return out


def compare(activations: Activations, address: str, a: str, b: str) -> Comparison:
    """Compare two sources of the text of `activations`, by name."""
    return compare_documents(
        activations,
        address,
        (a, source_documents(activations.text, a)),
        (b, source_documents(activations.text, b)),
    )


def compare_documents(
    activations: Activations,
    address: str,
    a: tuple[str, np.ndarray],
    b: tuple[str, np.ndarray],
) -> Comparison:
    """Compare two groups of documents, each a name and the documents' numbers."""
    if len(np.intersect1d(a[1], b[1])):
        raise InputError(f"{a[0]} and {b[0]} share documents; give groups that do not")
    left, right = group_counts(activations, address, (a, b))
    odds = log_odds(left, right)
    fires = (left.fired + right.fired) > 0
    q = np.ones(len(odds.p))
    q[fires] = benjamini_hochberg(odds.p[fires])
    return Comparison(address, left, right, odds, q)


def read_sides(a: str, b: Sequence[str]) -> list[Source]:
    """The texts of a comparison, a first: `NAME=SOURCE` each.

    SOURCE is what `features.sources_of` reads, a preset among it, or
    `dataset:OWNER/NAME[:SPLIT[:COLUMN]]` for a data set of the hub.
    """
    found = []
    for given in (a, *b):
        name, what = named(given)
        if what.startswith("dataset:"):
            found.append(Source(name, corpus.read_dataset(what.removeprefix("dataset:"))))
        else:
            found += sources_of([given])
    names = [source.name for source in found]
    if len(set(names)) != len(names):
        raise InputError(
            f"the texts need names of their own, and these are {', '.join(names)}; "
            "write NAME=SOURCE"
        )
    for source in found:
        if (n := sum(bool(d.text.strip()) for d in source.documents)) < 2:
            raise InputError(
                f"{source.name} is {n} document{'' if n == 1 else 's'}: documents are what is "
                "compared, so each side needs 2 or more; give a folder or several files"
            )
    return found


def write_csv(
    comparisons: Sequence[Comparison], file: Path, extra: dict[int, dict] | None = None
) -> None:
    """Write every row, full, one comparison after the other; `extra` adds columns by feature."""
    extra = extra or {}
    added = list(dict.fromkeys(name for row in extra.values() for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["a", "b", *KEYS, *MORE, *added])
    for one in comparisons:
        for row in one.rows(full=True):
            more = extra.get(row["feature"], {})
            cells = [one.a.name, one.b.name, *row.values(), *(more.get(n, "") for n in added)]
            writer.writerow([_cell(cell) for cell in cells])
    try:
        file.write_text(out.getvalue(), "utf-8", newline="")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def _cell(value: Any) -> Any:
    # A spreadsheet would run a cell of text that begins like a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _plain(value: Any) -> Any:
    return value.item()
