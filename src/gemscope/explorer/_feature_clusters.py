"""Which cluster a feature is in, where its dictionary's map has been made and kept."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ._feature_store import KeptStore
from ._map_made import KINDS, file_of, read

_KEPT = 8
"""Maps of which the clusters stay in memory."""
_SHOWN = 6
"""Other members that are named, the most typical first."""

_Clusters = dict[int, dict[str, Any]]
"""By feature; only clusters of two or more."""


class Clusters:
    """Clusters from the files of maps; a map that is made meanwhile is there on the next page."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, tuple[int, _Clusters]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, store: KeptStore, address: str, feature: int) -> list[dict[str, Any]]:
        """`{on, id, name, size, cohesion, members}` for each kind of map that has the feature in a
        cluster with others; `members` are the most typical others.
        """
        run = store.dictionary(address)["run"]
        found = []
        for on in KINDS:
            one = self._read(file_of(store, run, on), address).get(feature)
            if one is not None:
                said = {k: one[k] for k in ("id", "name", "size", "cohesion")}
                others = [f for f in one["members"][: _SHOWN + 1] if f != feature][:_SHOWN]
                found.append({"on": on, **said, "members": others})
        told = store.described((address, f) for one in found for f in one["members"])
        for one in found:
            one["members"] = [
                {"feature": f, "explanation": told.get((address, f), (None,))[0]}
                for f in one["members"]
            ]
        return found

    def _read(self, file: Path, address: str) -> _Clusters:
        try:
            made = file.stat().st_mtime_ns
        except OSError:
            return {}
        with self._lock:
            known = self._kept.get(file)
            if known is None or known[0] != made:
                record = read(file, address) or {}
                of = {f: one for one in record.get("clusters", []) if one["size"] > 1
                      for f in one["members"]}  # fmt: skip
                known = self._kept[file] = (made, of)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(file)
            return known[1]
