"""What features fire on."""

from ._look import Look as Look
from ._look import check_plot as check_plot
from ._look import look as look
from ._look import plot_look as plot_look
