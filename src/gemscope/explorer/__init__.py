"""The explorer: local web pages over models, dictionaries and catalog stores.

The names here are loaded on first use, so that a server listens before it has loaded all it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._app import create_app as create_app
    from ._export_site import best_of as best_of
    from ._export_site import export_site as export_site
    from ._export_site import labelled as labelled
    from ._limits import Limits as Limits
    from ._listen import listen as listen
    from ._security import Access as Access
    from ._serve import open_workbench as open_workbench
    from ._serve import run as run
    from ._workbench import Workbench as Workbench

_FACE = {
    "Access": "_security",
    "Limits": "_limits",
    "Workbench": "_workbench",
    "best_of": "_export_site",
    "create_app": "_app",
    "export_site": "_export_site",
    "labelled": "_export_site",
    "listen": "_listen",
    "open_workbench": "_serve",
    "run": "_serve",
}

__all__ = [
    "Access", "Limits", "Workbench", "best_of", "create_app", "export_site", "labelled", "listen",
    "open_workbench", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(import_module(f"gemscope.explorer.{_FACE[name]}"), name)
    raise AttributeError(f"module 'gemscope.explorer' has no attribute {name!r}")
