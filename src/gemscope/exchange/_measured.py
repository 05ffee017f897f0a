"""What a store has measured of a dictionary, ready to be written in the formats of others."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemscope.errors import InputError
from gemscope.features import Explanation, Note, Store, Text, token_pieces
from gemscope.relate import Rules

_BLOCK = 256
"""Features whose contexts are read together."""
_KEPT = 4096
"""Contexts whose tokens are kept as text."""
_BEFORE, _AFTER = 24, 12
_RULES = Rules()
_TOGETHER = 0.3
"""Least phi of features that fire together."""
_ALIKE = 0.5
"""Least cosine of similar directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which features are written."""

    features: tuple[int, ...] | None = None
    """None for all."""
    min_density: float = 0.0
    """Those that fire on this share of the tokens or more."""
    labelled: bool = False
    """Only those with an explanation or a note."""


class Measured:
    """The chosen features of one dictionary of a store, with their labels."""

    def __init__(self, store: Store, address: str, selection: Selection):
        self.store, self.address = store, address
        self.dictionary: dict[str, Any] = store.dictionary(address)
        self.explanations: dict[int, list[Explanation]] = {}
        for explanation in store.explanations(address):
            self.explanations.setdefault(explanation.feature, []).append(explanation)
        self.notes: dict[int, list[Note]] = {}
        for note in store.notes(address):
            self.notes.setdefault(note.feature, []).append(note)
        light = store.features(address, ["feature", "layer", "count", "density"]).to_pydict()
        self.layers: list[int] = light["layer"]
        self.counts: list[int] = light["count"]
        self.chosen = self._choose(selection, light["density"])
        self._text: Text | None = None
        self._tokenizer: Any = None
        self._held: dict[int, list[dict[str, Any]]] = {}
        self._pieces: dict[int, list[str]] = {}

    def _choose(self, selection: Selection, densities: Sequence[float]) -> list[int]:
        wanted: Sequence[int] = range(len(densities))
        if selection.features is not None:
            for feature in selection.features:
                self.store.check_feature(self.address, feature)
            wanted = sorted(set(selection.features))
        labelled = self.explanations.keys() | self.notes.keys()
        chosen = [
            feature
            for feature in wanted
            if (densities[feature] or 0.0) >= selection.min_density
            and (not selection.labelled or feature in labelled)
        ]
        if not chosen:
            raise InputError(f"no feature of {self.address} is left by what was asked for")
        return chosen

    @property
    def text(self) -> Text:
        """The text it was indexed on."""
        if self._text is None:
            self._text = self.store.text(self.address)
        return self._text

    @property
    def tokenizer(self) -> Any:
        """Of its model."""
        if self._tokenizer is None:
            self._tokenizer = self.store.tokenizer(self.address)
        return self._tokenizer

    def rows(self, size: int = 1024) -> Iterator[dict[str, Any]]:
        """The chosen features' rows, in order; `size` of them are in memory at a time."""
        table = self.store.features(self.address).take(self.chosen)
        for first in range(0, table.num_rows, size):
            yield from table.slice(first, size).to_pylist()

    def contexts(self, feature: int) -> list[dict[str, Any]]:
        """The contexts of a feature, by group and rank; asked for in order, they are read in
        blocks.
        """
        if feature not in self._held:
            place = bisect_left(self.chosen, feature)
            block = self.chosen[place : place + _BLOCK] or [feature]
            found: dict[int, list[dict[str, Any]]] = {f: [] for f in block}
            run = str(self.dictionary["run"]).replace("'", "''")
            where = f"run = '{run}' AND feature >= {block[0]} AND feature <= {block[-1]}"
            for row in self.store.rows("contexts", where).to_pylist():
                if row["feature"] in found:
                    found[row["feature"]].append(row)
            self._held = {f: sorted(rows, key=_order) for f, rows in found.items()}
        return self._held[feature]

    def pieces(self, context: int, first: int = 0, stop: int | None = None) -> list[str]:
        """The tokens `first` to `stop` of a context."""
        if context not in self._pieces:
            if len(self._pieces) >= _KEPT:
                self._pieces.clear()
            begin, end = (int(n) for n in self.text.offsets[context : context + 2])
            ids = self.text.ids[begin:end].tolist()
            self._pieces[context] = token_pieces(self.tokenizer, ids)
        return self._pieces[context][first:stop]

    def excerpts(self, feature: int, most: int) -> list[str]:
        """Text around the peaks of the strongest contexts, the strongest first."""
        top = [row for row in self.contexts(feature) if row["group"] == "top"][:most]
        found = []
        for row in top:
            peak = int(row["position"])
            # A window that begins in the middle of a word or not: BOS is never part of it.
            first = max(1, peak - _BEFORE)
            found.append("".join(self.pieces(int(row["context"]), first, peak + _AFTER + 1)))
        return found

    def related(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """`related_features` of a feature, each once: by what fires together, then by direction.

        The rules are those of `gemscope.relate`, on the pairs that the store holds.
        """
        cosines = {int(n["feature"]): float(n["cosine"]) for n in row["neighbours"] or []}
        found: dict[int, str] = {}
        for pair in row["together"] or []:
            other = int(pair["feature"])
            relation = self._relation(row, pair, cosines.get(other, 0.0))
            if relation is not None:
                found[other] = relation
        for other, cosine in cosines.items():
            if cosine <= _RULES.opposed:
                found[other] = "opposite"
            elif cosine >= _ALIKE:
                found.setdefault(other, "similar direction")
        return [
            {"layer": self.layers[other], "index": other, "relationship": relation}
            for other, relation in found.items()
        ]

    def _relation(self, row: dict[str, Any], pair: dict[str, Any], cosine: float) -> str | None:
        mine, theirs = self.counts[int(row["feature"])], self.counts[int(pair["feature"])]
        if min(mine, theirs) < _RULES.least:
            return None
        with_it, with_me = pair["count"] / mine, pair["count"] / theirs
        if min(with_it, with_me) >= _RULES.same and cosine >= _RULES.alike:
            return "duplicate"
        if pair["lift"] >= _RULES.lift:
            if with_it >= _RULES.within and with_me <= _RULES.apart:
                return "higher-abstraction"
            if with_me >= _RULES.within and with_it <= _RULES.apart:
                return "sub-concept"
        return "fires together" if pair["phi"] >= _TOGETHER else None


def _order(row: dict[str, Any]) -> tuple[int, int]:
    # The strongest, the intervals by number, then what else there is.
    group = str(row["group"])
    number = int(group[-1]) if group.startswith("interval ") else 9
    return 0 if group == "top" else number, int(row["rank"])


def measure(store: Store, addresses: Sequence[str], selection: Selection) -> list[Measured]:
    """The chosen features of `addresses`, each once."""
    if not addresses:
        known = [str(row["address"]) for row in store.dictionaries()]
        raise InputError(f"name a dictionary of the store: {', '.join(known[:6]) or 'it has none'}")
    return [Measured(store, address, selection) for address in dict.fromkeys(addresses)]


Progress = Callable[[str, int, int], None]
"""Called with what is being written, features done and features in all."""
