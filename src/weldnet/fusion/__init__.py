"""Fusion: align, transport, average, repair; one call and an honest report."""

from weldnet.fusion._auto import Auto
from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset
from weldnet.fusion._calibrate import Calibrate
from weldnet.fusion._chain import Chain
from weldnet.fusion._compare import compare
from weldnet.fusion._comparison import Combination, Comparison, Reference
from weldnet.fusion._fold import fold
from weldnet.fusion._fuse import fuse
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._protocol import NoRepair, Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._repair import REPAIRS, make_repair
from weldnet.fusion._report import Report, Row, score_text
from weldnet.fusion._rescale import Rescale
from weldnet.fusion._room import find_room
from weldnet.fusion._synthetic import Synthetic
from weldnet.fusion._weights import WeightNorms

__all__ = [
    "REPAIRS",
    "Auto",
    "Averaged",
    "BatchNormReset",
    "Calibrate",
    "Chain",
    "Combination",
    "Comparison",
    "Fusion",
    "NoRepair",
    "Reference",
    "Refit",
    "Repair",
    "Repaired",
    "Report",
    "Rescale",
    "Row",
    "Synthetic",
    "WeightNorms",
    "average",
    "compare",
    "find_room",
    "fold",
    "fuse",
    "make_repair",
    "normalise_weights",
    "score_text",
]
