"""The command line: one file per verb."""

from ._app import app as app
from ._app import main as main
