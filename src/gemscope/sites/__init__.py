"""Where activations are read and written: sites, streams, and each model family's places."""

from ._family import FAMILIES as FAMILIES
from ._family import Family as Family
from ._family import Side as Side
from ._family import Tap as Tap
from ._family import family_named as family_named
from ._family import family_of as family_of
from ._family import site_of_hook as site_of_hook
from ._site import Site as Site
from ._site import Sites as Sites
from ._site import Stream as Stream
from ._site import each as each
from ._site import parse_sites as parse_sites
from ._transformer_lens import site_of_transformer_lens as site_of_transformer_lens
from ._transformer_lens import transformer_lens_hook as transformer_lens_hook
