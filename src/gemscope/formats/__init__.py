"""Weight files: one reader per published layout, folder in, tensors and facts out."""

from ._gemma_scope_2 import CONFIG as CONFIG
from ._gemma_scope_2 import PARAMETERS as PARAMETERS
from ._gemma_scope_2 import Config as Config
from ._gemma_scope_2 import check as check
from ._gemma_scope_2 import read as read
from ._gemma_scope_2 import read_config as read_config
from ._gemma_scope_2 import read_shapes as read_shapes
from ._gemma_scope_2 import write as write
from ._safetensors import TensorInfo as TensorInfo
from ._safetensors import read_header as read_header
