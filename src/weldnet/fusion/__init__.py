"""Fusion: align, transport, average, repair; one call and an honest report."""

from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset
from weldnet.fusion._fuse import fuse
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._repair import REPAIRS, NoRepair, Repair, make_repair
from weldnet.fusion._report import Report, Row, score_text

__all__ = [
    "REPAIRS",
    "Averaged",
    "BatchNormReset",
    "Fusion",
    "NoRepair",
    "Repair",
    "Repaired",
    "Report",
    "Row",
    "average",
    "fuse",
    "make_repair",
    "normalise_weights",
    "score_text",
]
