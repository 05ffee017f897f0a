"""Where activations are read and written: sites, streams, and each model family's places."""

from ._family import FAMILIES as FAMILIES
from ._family import Family as Family
from ._family import Side as Side
from ._family import Tap as Tap
from ._family import family_of as family_of
from ._site import Site as Site
from ._site import Stream as Stream
