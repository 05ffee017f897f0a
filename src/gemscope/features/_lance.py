"""LanceDB, without the parts of it that cost time and are for others."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Its warnings are meant for its own developers; before the import, which reads this.
for name in ("LANCE_LOG", "LANCEDB_LOG"):
    os.environ.setdefault(name, "error")

_CLIENT = "lance_namespace_urllib3_client"
"""A client of catalogs on servers, of which LanceDB imports the classes of data."""


def connect(folder: Path) -> Any:
    """The tables of a folder."""
    if "lancedb" not in sys.modules:
        _put_off(_CLIENT)
    import lancedb

    return lancedb.connect(str(folder))


class _Put(ModuleType):
    """A package whose parts can be imported, and whose own code runs when a name of it is used."""

    def __init__(self, spec: ModuleSpec):
        super().__init__(spec.name)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())
        self.__file__, self.__loader__ = spec.origin, spec.loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_run" in self.__dict__ or self.__spec__ is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__["_run"] = True
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _put_off(package: str) -> None:
    """Import a package only as far as its parts are: its whole takes half a second."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.loader is not None and spec.submodule_search_locations:
        sys.modules[package] = _Put(spec)
