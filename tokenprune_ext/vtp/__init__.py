"""VTP: remove channels inside the blocks of a vision transformer (Zhu, Tang, Han, arXiv 2104.08500).

:func:`add_gates`, train with :func:`penalty`, :func:`prune`, fine-tune. Both kinds of pruning go together: what comes
out is a model for ``tokenprune_ext.apply``.
"""

from tokenprune_ext.channels import PLACES, Widths, narrow, narrow_to, widths_of

from .gates import LAMBDA, Gated, add_gates, gates_of, penalty, remove_gates
from .latency import AsFast, prune_to_latency
from .prune import prune, ranking_of
from .ranking import Ranking, tile_of
from .report import WidthReport, report
from .width_table import WidthTable, measure_widths

__all__ = [
    "LAMBDA",
    "PLACES",
    "AsFast",
    "Gated",
    "Ranking",
    "WidthReport",
    "WidthTable",
    "Widths",
    "add_gates",
    "gates_of",
    "measure_widths",
    "narrow",
    "narrow_to",
    "penalty",
    "prune",
    "prune_to_latency",
    "ranking_of",
    "remove_gates",
    "report",
    "tile_of",
    "widths_of",
]
