"""Fusion: align, transport, average, repair; one call and an honest report.

`fuse` and `compare` are made of steps that studies use one by one: `prepare`, `align_parents`, `average_at`,
`leave_parents`, and `measured`, which says what a step takes.
"""

from weldnet.fusion._auto import Auto
from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics
from weldnet.fusion._calibrate import Calibrate
from weldnet.fusion._chain import Chain
from weldnet.fusion._compare import compare
from weldnet.fusion._comparison import Combination, Comparison, Reference
from weldnet.fusion._effort import Counted, Effort, counted_inputs, measured, one_reason
from weldnet.fusion._fold import fold
from weldnet.fusion._fuse import fuse
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._judging import few_inputs, twins
from weldnet.fusion._protocol import NoRepair, Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._repair import REPAIRS, make_repair
from weldnet.fusion._report import Report, Row, score_text
from weldnet.fusion._rescale import Rescale
from weldnet.fusion._room import find_room
from weldnet.fusion._size import Sized, average_at
from weldnet.fusion._steps import (
    Aligned,
    Clock,
    Prepared,
    align_parents,
    average_parents,
    leave_parents,
    naive_average,
    prepare,
)
from weldnet.fusion._synthetic import Synthetic
from weldnet.fusion._variances import variances
from weldnet.fusion._weights import WeightNorms

__all__ = [
    "REPAIRS",
    "Aligned",
    "Auto",
    "Averaged",
    "BatchNormReset",
    "Calibrate",
    "Chain",
    "Clock",
    "Combination",
    "Comparison",
    "Counted",
    "Effort",
    "Fusion",
    "NoRepair",
    "Prepared",
    "Reference",
    "Refit",
    "Repair",
    "Repaired",
    "Report",
    "Rescale",
    "Row",
    "Sized",
    "Synthetic",
    "WeightNorms",
    "align_parents",
    "average",
    "average_at",
    "average_parents",
    "compare",
    "counted_inputs",
    "few_inputs",
    "find_room",
    "fold",
    "fuse",
    "has_statistics",
    "leave_parents",
    "make_repair",
    "measured",
    "naive_average",
    "normalise_weights",
    "one_reason",
    "prepare",
    "score_text",
    "twins",
    "variances",
]
