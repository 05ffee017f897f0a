"""Metrics of dictionaries on text, and the report."""

from ._check import Row as Row
from ._check import check as check
from ._check import check_text as check_text
from ._evaluate import Settings as Settings
from ._evaluate import evaluate as evaluate
from ._figures import COLOURS as COLOURS
from ._figures import dress as dress
from ._figures import svg as svg
from ._importance import uniformity as uniformity
from ._metrics import DEFINITIONS as DEFINITIONS
from ._pass import Evaluation as Evaluation
from ._record import Provenance as Provenance
from ._record import Record as Record
from ._record import finite as finite
from ._record import record as record
from ._report import report_folder as report_folder
from ._report import shown_token as shown_token
from ._report import template as template
from ._report import write_report as write_report
from ._report import write_text as write_text
from ._top import ContextRecord as ContextRecord
from ._top import FeatureRecord as FeatureRecord
from ._top import top_features as top_features
