"""The strongest context of features that a search found, a few tokens about its peak."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from gemscope.features import Found, Store, Text, token_pieces

from ._workbench import Workbench

_BEFORE, _AFTER = 12, 6
_TEXTS = 4
"""Texts that stay in memory."""

Top = list[tuple[str, float]]
"""Tokens with the feature's activations."""


class Tops:
    """Looks contexts up for many features at once; keeps the texts and tokenizers they need."""

    def __init__(self) -> None:
        self._texts: OrderedDict[tuple[str, str], Text] = OrderedDict()
        self._tokenizers: dict[str, Any] = {}

    def of(self, bench: Workbench, found: Iterable[Found]) -> dict[tuple[str, int], Top]:
        """By address and feature; a feature that never fired has none."""
        by_store: dict[int, list[Found]] = {}
        stores: dict[str, Store] = {}
        for one in found:
            store = stores.setdefault(one.address, bench.store_of(one.address))
            by_store.setdefault(bench.stores.index(store), []).append(one)
        out: dict[tuple[str, int], Top] = {}
        for place, some in by_store.items():
            out |= self._in(bench.stores[place], some)
        return out

    def _in(self, store: Store, found: list[Found]) -> dict[tuple[str, int], Top]:
        facts = {a: store.dictionary(a) for a in {f.address for f in found}}
        runs = {known["run"]: address for address, known in facts.items()}
        wanted = {(f.address, f.feature) for f in found}
        numbers = ", ".join(map(str, sorted({f.feature for f in found})))
        columns = ["run", "feature", "context", "position", "positions", "values"]
        rows = store.rows(
            "contexts", f"feature IN ({numbers}) AND rank = 0 AND group = 'top'", columns
        )
        out = {}
        # Most rows are other dictionaries': only what is wanted becomes Python.
        for i, (run, feature) in enumerate(
            zip(rows["run"].to_pylist(), rows["feature"].to_pylist(), strict=True)
        ):
            address = runs.get(run)
            if address is not None and (address, feature) in wanted:
                row = {n: rows[n][i].as_py() for n in columns[2:]}
                out[address, feature] = self._window(store, facts[address], row)
        return out

    def _window(self, store: Store, known: dict[str, Any], row: dict[str, Any]) -> Top:
        text = self._text(store, known)
        begin, end = (int(x) for x in text.offsets[row["context"] : row["context"] + 2])
        first = max(1, row["position"] - _BEFORE)
        last = min(end - begin, row["position"] + _AFTER + 1)
        pieces = token_pieces(
            self._tokenizer(store, known), text.ids[begin + first : begin + last].tolist()
        )
        values = dict(zip(row["positions"], row["values"], strict=True))
        return [(piece, values.get(first + i, 0.0)) for i, piece in enumerate(pieces)]

    def _text(self, store: Store, known: dict[str, Any]) -> Text:
        key = (str(store.folder), known["text_key"])
        if key not in self._texts:
            self._texts[key] = store.text(known["address"])
            while len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        return self._texts[key]

    def _tokenizer(self, store: Store, known: dict[str, Any]) -> Any:
        name = known["loaded_model"]
        if name not in self._tokenizers:
            self._tokenizers[name] = store.tokenizer(known["address"])
        return self._tokenizers[name]
