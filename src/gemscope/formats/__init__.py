"""Weight files: one reader per published layout, folder in, tensors and facts out."""

from ._facts import Facts as Facts
from ._facts import Part as Part
from ._gemma_scope import write as write_gemma_scope
from ._gemma_scope_2 import CONFIG as CONFIG
from ._gemma_scope_2 import Config as Config
from ._gemma_scope_2 import hook_of as hook_of
from ._gemma_scope_2 import read_config as read_config
from ._gemma_scope_2 import write as write_gemma_scope_2
from ._layouts import LAYOUTS as LAYOUTS
from ._layouts import inspect as inspect
from ._layouts import layout_of as layout_of
from ._layouts import read as read
from ._saelens_write import write as write_saelens
from ._safetensors import TensorInfo as TensorInfo
from ._safetensors import read_header as read_header

__all__ = [
    "CONFIG", "LAYOUTS", "Config", "Facts", "Part", "TensorInfo", "hook_of", "inspect",
    "layout_of", "read", "read_config", "read_header", "write_gemma_scope", "write_gemma_scope_2",
    "write_saelens",
]  # fmt: skip
