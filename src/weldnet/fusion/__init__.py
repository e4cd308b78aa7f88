"""Fusion: align, transport, average, repair; one call and an honest report."""

from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset
from weldnet.fusion._compare import compare
from weldnet.fusion._comparison import Combination, Comparison, Reference
from weldnet.fusion._fuse import fuse
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._repair import REPAIRS, NoRepair, Repair, make_repair
from weldnet.fusion._report import Report, Row, score_text

__all__ = [
    "REPAIRS",
    "Averaged",
    "BatchNormReset",
    "Combination",
    "Comparison",
    "Fusion",
    "NoRepair",
    "Reference",
    "Repair",
    "Repaired",
    "Report",
    "Row",
    "average",
    "compare",
    "fuse",
    "make_repair",
    "normalise_weights",
    "score_text",
]
