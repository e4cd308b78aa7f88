"""Fusion: align, transport, average, repair; one call and an honest report."""

from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._fuse import Fusion, fuse
from weldnet.fusion._repair import REPAIRS, BatchNormReset, NoRepair, Repair, make_repair
from weldnet.fusion._report import Report, Row

__all__ = [
    "REPAIRS",
    "BatchNormReset",
    "Fusion",
    "NoRepair",
    "Repair",
    "Report",
    "Row",
    "average",
    "fuse",
    "make_repair",
    "normalise_weights",
]
