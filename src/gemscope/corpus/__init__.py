"""Text to tokens: sources, packing, and the mask of tokens that count."""

from gemscope.miniature import Document as Document

from ._pack import Context as Context
from ._pack import Prefix as Prefix
from ._pack import TokenBatch as TokenBatch
from ._pack import contexts as contexts
from ._pack import pack as pack
from ._presets import PRESETS as PRESETS
from ._text import BUNDLED as BUNDLED
from ._text import LIBRARY as LIBRARY
from ._text import read_dataset as read_dataset
from ._text import read_text as read_text
