"""Catalogs in and out: the formats that the field keeps its analyses in."""

from ._catalog import RELATIONSHIPS as RELATIONSHIPS
from ._compare import Comparison as Comparison
from ._delphi import import_delphi as import_delphi
from ._delphi import read_delphi as read_delphi
from ._exchange import WRITTEN as WRITTEN
from ._exchange import Exported as Exported
from ._exchange import Options as Options
from ._exchange import export as export
from ._exchange import import_labels as import_labels
from ._exchange import validate as validate
from ._guess import FORMATS as FORMATS
from ._guess import format_of as format_of
from ._incoming import Imported as Imported
from ._kept import imported_contexts as imported_contexts
from ._kept import imported_features as imported_features
from ._labels import Problem as Problem
from ._labels import best_explanation as best_explanation
from ._labels import human_word as human_word
from ._measured import Selection as Selection
from ._merge import Conflict as Conflict
from ._merge import Merged as Merged
from ._merge import merge_catalogs as merge_catalogs
