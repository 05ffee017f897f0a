"""What the pages are about: catalog stores, the model, dictionaries; loaded when asked for."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope import hub
from gemscope.errors import InputError, did_you_mean
from gemscope.features import Store
from gemscope.sites import parse_sites

from ._first import Making
from ._limits import Limits

if TYPE_CHECKING:
    from gemscope.lm import LanguageModel
    from gemscope.sae import Dictionary

_KEPT = 16
"""Dictionaries that stay loaded; of mapped files only what was used is in memory."""

_FRESH = 0.3
"""Seconds for which what stores hold is taken to be as it was."""


class Workbench:
    """Stores in the order they were given; a dictionary in several is taken from the first."""

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        model: str | None = None,
        limits: Limits = Limits(),
        reports: Path | None = None,
        graphs: Sequence[Path] = (),
    ):
        self.stores, self.limits = list(stores), limits
        self.graphs = tuple(graphs)
        """Files of attribution graphs, beside those that the stores keep."""
        self.reports = reports
        """A folder with reports of `gemscope eval`, for the scope."""
        self._model_name = model
        self.making: Making | None = None
        """Makes a first store; pages say so while it runs."""
        self._models: dict[str, LanguageModel] = {}
        self._dictionaries: OrderedDict[str, Dictionary] = OrderedDict()
        self._seen: tuple[float, dict[str, tuple[Store, dict[str, Any]]]] = (float("-inf"), {})
        self._lock, self._model_lock = threading.Lock(), threading.Lock()

    def known(self) -> dict[str, dict[str, Any]]:
        """What is known of every indexed dictionary, by address."""
        return {address: facts for address, (_, facts) in self._indexed().items()}

    def store_of(self, address: str) -> Store:
        """The store that has `address`."""
        indexed = self._indexed()
        if address in indexed:
            return indexed[address][0]
        near = did_you_mean(address, indexed) if indexed else "no store is open"
        raise InputError(f"{address} is not indexed in any open store; {near}")

    def _indexed(self) -> dict[str, tuple[Store, dict[str, Any]]]:
        """Each dictionary with its store. A page asks many times, and a store is then looked into
        once; what is indexed meanwhile shows a moment later.
        """
        looked, found = self._seen
        if time.monotonic() - looked > _FRESH:
            out: dict[str, tuple[Store, dict[str, Any]]] = {}
            for store in self.stores:
                for facts in store.dictionaries():
                    out.setdefault(facts["address"], (store, facts))
            found = dict(sorted(out.items()))
            self._seen = (time.monotonic(), found)
        return found

    @property
    def model_name(self) -> str:
        """The model that texts are run on: the one given, or that of the first dictionary."""
        if self._model_name:
            return self._model_name
        known = self.known()
        return next(iter(known.values()))["model"] if known else "miniature"

    def model(self, name: str | None = None) -> "LanguageModel":
        """A model, loaded when it is first asked for.

        One that was neither given nor indexed on is refused: a page must not make the server fetch
        things.
        """
        from gemscope.lm import load_model

        name = name or self.model_name
        known = {self.model_name, "miniature"}
        for facts in self.known().values():
            known |= {facts["model"], facts.get("loaded_model", facts["model"])}
        if name not in known:
            raise InputError(f"{name} is no model of this server; {did_you_mean(name, known)}")
        source = hub.model_source(name)
        with self._model_lock:
            if source not in self._models:
                self._models[source] = load_model(name)
            return self._models[source]

    def model_of(self, addresses: Iterable[str]) -> "LanguageModel":
        """The one model of some dictionaries, or the one that the server was told to run."""
        names = {
            name: hub.model_source(name) for name in (self.facts(a)["model"] for a in addresses)
        }
        if len(set(names.values())) > 1:
            raise InputError(
                f"the dictionaries are of different models, {', '.join(sorted(names))}; choose "
                "those of one"
            )
        known = self.known()
        of_stores = {
            hub.model_source(name): f.get("loaded_model", f["model"])
            for f in known.values() for name in (f["model"], f.get("loaded_model", f["model"]))
        }  # fmt: skip
        if known and hub.model_source(self.model_name) not in of_stores:
            # Told to run another one, such as a copy in a folder.
            return self.model()
        (source,) = set(names.values())
        if source in of_stores:
            return self.model(of_stores[source])
        return self.model("miniature" if source == hub.model_source("miniature") else None)

    def facts(self, address: str) -> dict[str, Any]:
        """What a dictionary is: one that is indexed, or in the catalog with its files here."""
        known = self.known()
        if address in known:
            return known[address] | {"indexed": True}
        entry = self.entry(address)
        return {
            "address": address, "kind": entry.kind, "model": entry.model,
            "reads": str(entry.reads), "d_sae": entry.d_sae, "indexed": False,
        }  # fmt: skip

    def entry(self, address: str) -> hub.Entry:
        """The artefact of an indexed dictionary, or of one in the catalog, whose files are here.

        Nothing else: an address comes from whoever asks, and must not make the server read a
        folder or fetch anything.
        """
        facts = self.known().get(address)
        release = address.partition("/")[0]
        if facts is None and not any(
            e.address == address for e in hub.catalog(release=release or "none")
        ):
            raise InputError(
                f"{address} is neither indexed in an open store nor in the catalog; gemscope list "
                "shows the catalog, gemscope index ADDRESS --to STORE indexes"
            )
        if facts is None or any(e.address == address for e in hub.catalog(release=release)):
            entry = hub.locate(address, download=False)
        else:
            said = hub.Given(
                reads=parse_sites(facts["reads"]), writes=parse_sites(facts["writes"]),
                model=facts["model"],
            )  # fmt: skip
            entry = hub.locate(address, said, download=False)
        if entry.path is None:
            raise InputError(f"the files of {address} are not here: gemscope download {address}")
        return entry

    def dictionary(self, address: str) -> "Dictionary":
        """The weights of a dictionary; the least recently used of many is let go."""
        with self._lock:
            if address not in self._dictionaries:
                self._dictionaries[address] = hub.build(self.entry(address))
                while len(self._dictionaries) > _KEPT:
                    self._dictionaries.popitem(last=False)
            self._dictionaries.move_to_end(address)
            return self._dictionaries[address]
