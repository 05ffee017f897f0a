"""gemscope: the open workbench for Gemma Scope.

The names here are loaded on first use, so that importing costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemscope.corpus import read_text as read_text
    from gemscope.hub import catalog as catalog
    from gemscope.hub import load_sae as load_sae
    from gemscope.hub import save_sae as save_sae
    from gemscope.lm import load_model as load_model
    from gemscope.lm import splice as splice
    from gemscope.sites import Site as Site
    from gemscope.steering import steer as steer

__version__ = "0.1.0"

_FACE = {
    "Site": "gemscope.sites",
    "catalog": "gemscope.hub",
    "load_model": "gemscope.lm",
    "load_sae": "gemscope.hub",
    "read_text": "gemscope.corpus",
    "save_sae": "gemscope.hub",
    "splice": "gemscope.lm",
    "steer": "gemscope.steering",
}

__all__ = ["Site", "catalog", "load_model", "load_sae", "read_text", "save_sae", "splice", "steer"]


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(import_module(_FACE[name]), name)
    raise AttributeError(f"module 'gemscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
