"""Language models: loading, reading activations, splicing and editing them."""

from ._edit import Edit as Edit
from ._edit import Edits as Edits
from ._edit import replace as replace
from ._edit import splice as splice
from ._frame import Tokens as Tokens
from ._generate import Generated as Generated
from ._model import LanguageModel as LanguageModel
from ._model import Run as Run
from ._model import load_model as load_model
from ._weights import Block as Block
from ._weights import Weights as Weights
from ._weights import wide as wide
