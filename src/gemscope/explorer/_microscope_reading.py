"""What dictionaries say of a text: one pass for all of them, and the record that is shown."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemscope import hub
from gemscope.errors import InputError
from gemscope.features import Store, described, masked, token_pieces
from gemscope.sites import each, parse_sites

from ._workbench import Workbench

if TYPE_CHECKING:
    from gemscope.lm import LanguageModel
    from gemscope.sae import SparseFeatures

_KEPT = 16
"""Readings that are kept: a lock, another order or a page back costs no pass."""
Layers = Callable[[int], int] | None


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens of a text and the code of each dictionary; empty at tokens that do not count."""

    tokens: list[str]
    """Each token by itself, as `gemscope look` has it."""
    pieces: list[str]
    """The same so that together they are the text; a split character stands at its last token."""
    counted: list[bool]
    codes: "dict[str, SparseFeatures]"


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of a dictionary's features by number; None of one that is not indexed."""

    density: np.ndarray | None
    max: np.ndarray | None

    def hidden(self, features: np.ndarray, max_density: float) -> np.ndarray:
        """Which of `features` fire on a larger share of the indexed tokens."""
        if self.density is None:
            return np.zeros(len(features), bool)
        return self.density[features] > max_density

    def of(self, feature: int) -> dict[str, float | None]:
        """Density and maximum of a feature."""
        return {"density": _number(self.density, feature), "max": _number(self.max, feature)}


class Readings:
    """Reads texts with dictionaries of a workbench and keeps what it read last."""

    def __init__(self, bench: Workbench):
        self._bench = bench
        self._kept: OrderedDict[tuple[str, str, tuple[str, ...]], Reading] = OrderedDict()

    def read(self, text: str, addresses: Sequence[str]) -> Reading:
        """The reading of `text` by `addresses`, which are of one model."""
        self._bench.limits.check_text(text)
        chosen = tuple(dict.fromkeys(addresses))
        model = self._bench.model_of(chosen)
        key = (model.name or "", text, chosen)
        if key not in self._kept:
            self._kept[key] = self._pass(model, text, chosen)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _pass(self, model: "LanguageModel", text: str, addresses: Sequence[str]) -> Reading:
        import torch

        batch = model.tokens(text)
        n_tokens, most = batch.ids.shape[1], self._bench.limits.tokens
        if n_tokens > most:
            raise InputError(f"the text has {n_tokens:,} tokens, and {most:,} are read; cut it")
        saes = {a: self._bench.dictionary(a).to(model.device) for a in addresses}
        for sae in saes.values():
            model.check(sae)
        codes = {}
        with torch.no_grad():
            run = model.run(batch, read=[sae.reads for sae in saes.values()])
            counts = batch.counts[0]
            for address, sae in saes.items():
                found = sae.encode(run[sae.reads][0].float())
                codes[address] = masked(found, counts).to("cpu")
        ids = batch.ids[0].tolist()
        tokens = [model.tokenizer.decode([i]) for i in ids]
        return Reading(tokens, token_pieces(model.tokenizer, ids), counts.tolist(), codes)


def chosen_of(bench: Workbench, addresses: Sequence[str]) -> list[str]:
    """The dictionaries asked for, or the widest; refuses more than are read at once."""
    chosen = list(dict.fromkeys(addresses)) or [default(bench)]
    if len(chosen) > bench.limits.dictionaries:
        raise InputError(
            f"{len(chosen)} dictionaries were chosen, and {bench.limits.dictionaries} are read at "
            "once; choose fewer"
        )
    for address in chosen:
        bench.facts(address)
    return chosen


def default(bench: Workbench) -> str:
    """The widest dictionary of a single site."""
    known = list(bench.known().values())
    if not known:
        bundled = hub.catalog(release="miniature")
        return max(bundled, key=lambda e: (e.d_sae or 0, e.address)).address
    single = [f for f in known if len(each(parse_sites(f["reads"]))) == 1] or known
    return max(single, key=lambda f: (f["d_sae"], f["address"]))["address"]


def figures_of(bench: Workbench, address: str) -> Figures:
    """Densities and maxima from the store of a dictionary."""
    if address not in bench.known():
        return Figures(None, None)
    rows = bench.store_of(address).figures()[address]
    return Figures(rows[:, 0], rows[:, 1])


def said_of(
    bench: Workbench, features: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, float | None]]:
    """What each of some features is called, and the score, by `(address, feature)`."""
    known = bench.known()
    by_store: dict[int, tuple[Store, list[tuple[str, int]]]] = {}
    for address, feature in set(features):
        if address in known:
            store = bench.store_of(address)
            by_store.setdefault(id(store), (store, []))[1].append((address, feature))
    said: dict[tuple[str, int], tuple[str, float | None]] = {}
    for store, wanted in by_store.values():
        said |= described(store, wanted)
    return said


def fired(
    reading: Reading, address: str, figures: Figures, max_density: float
) -> list[list[tuple[int, float]]]:
    """For each token all features that fire and are not too dense, strongest first."""
    code = reading.codes[address]
    hidden = figures.hidden(np.arange(code.d_sae), max_density)
    return [[p for p in pairs if not hidden[p[0]]] for pairs in code.top(code.d_sae)]


def record(
    bench: Workbench, readings: Readings, text: str, addresses: Sequence[str], *, top: int,
    max_density: float,
) -> dict[str, Any]:  # fmt: skip
    """What `/api/look` says: tokens, and of each dictionary the strongest features per token."""
    chosen = chosen_of(bench, addresses)
    reading = readings.read(text, chosen)
    shown = {}
    for address in chosen:
        figures = figures_of(bench, address)
        tops = [pairs[:top] for pairs in fired(reading, address, figures, max_density)]
        shown[address] = (figures, tops)
    said = said_of(
        bench, ((a, f) for a, (_, tops) in shown.items() for pairs in tops for f, _ in pairs)
    )
    parts = []
    for address, (figures, tops) in shown.items():
        layers = layers_of(bench, address)
        parts.append(
            {
                **{k: bench.facts(address)[k] for k in ("address", "reads", "d_sae")},
                "l0": reading.codes[address].counts.tolist(),
                "features": [
                    [entry(address, f, v, figures, said, layers) for f, v in pairs]
                    for pairs in tops
                ],
            }
        )
    return {
        "text": text, "tokens": reading.tokens, "pieces": reading.pieces,
        "counted": reading.counted, "top": top, "max_density": max_density, "dictionaries": parts,
    }  # fmt: skip


def entry(
    address: str, feature: int, value: float, figures: Figures,
    said: dict[tuple[str, int], tuple[str, float | None]], layers: Layers,
) -> dict[str, Any]:  # fmt: skip
    """A feature on a token: as `gemscope look` has it, and what the store knows of it."""
    text, score = said.get((address, feature), (None, None))
    out: dict[str, Any] = {"feature": feature, "value": value}
    if layers is not None:
        out["layer"] = layers(feature)
    return out | figures.of(feature) | {"explanation": text, "score": score}


def layers_of(bench: Workbench, address: str) -> Layers:
    """The layer that a feature of a multi-layer model is read in; None of a single site."""
    from gemscope.sae import SAE

    sae = bench.dictionary(address)
    if isinstance(sae, SAE):
        return None
    return lambda feature: sae.reads[sae.layer_of(feature)].layer


def _number(column: np.ndarray | None, feature: int) -> float | None:
    return None if column is None or np.isnan(column[feature]) else float(column[feature])
