"""weldnet: two or more trained networks in, one verified network out.

Everything public is loaded when it is first used, so that ``import weldnet`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weldnet._version import __version__

if TYPE_CHECKING:
    from weldnet.alignment import (
        METHODS,
        ActivationMatching,
        Alignment,
        Diagnosis,
        FrankWolfe,
        Gamf,
        Identity,
        MatchedAveraging,
        MergeMany,
        OptimalTransport,
        SinkhornRebasin,
        StraightThrough,
        WeightMatching,
        align,
        diagnose,
        transport,
    )
    from weldnet.checkpoints import load, load_model
    from weldnet.errors import CaptureError, StructureError, WeldnetError, WidthError
    from weldnet.evaluation import Barrier, Metrics, Plane, barrier, evaluate, plane
    from weldnet.fusion import BatchNormReset, Comparison, Fusion, Refit, Report, Rescale, average, compare, fold, fuse
    from weldnet.streaming import Streamed, fuse_files
    from weldnet.structure import Check, Place, Power, Space, Structure, capture, check, power
    from weldnet.training import distil, fine_tune

_HOME = {
    "weldnet.alignment": (
        "METHODS",
        "ActivationMatching",
        "Alignment",
        "Diagnosis",
        "FrankWolfe",
        "Gamf",
        "Identity",
        "MatchedAveraging",
        "MergeMany",
        "OptimalTransport",
        "SinkhornRebasin",
        "StraightThrough",
        "WeightMatching",
        "align",
        "diagnose",
        "transport",
    ),
    "weldnet.checkpoints": ("load", "load_model"),
    "weldnet.errors": ("CaptureError", "StructureError", "WeldnetError", "WidthError"),
    "weldnet.evaluation": ("Barrier", "Metrics", "Plane", "barrier", "evaluate", "plane"),
    "weldnet.fusion": (
        "BatchNormReset",
        "Comparison",
        "Fusion",
        "Refit",
        "Report",
        "Rescale",
        "average",
        "compare",
        "fold",
        "fuse",
    ),
    "weldnet.streaming": ("Streamed", "fuse_files"),
    "weldnet.structure": ("Check", "Place", "Power", "Space", "Structure", "capture", "check", "power"),
    "weldnet.training": ("distil", "fine_tune"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "ActivationMatching",
    "Alignment",
    "Barrier",
    "BatchNormReset",
    "CaptureError",
    "Check",
    "Comparison",
    "Diagnosis",
    "FrankWolfe",
    "Fusion",
    "Gamf",
    "Identity",
    "MatchedAveraging",
    "MergeMany",
    "Metrics",
    "OptimalTransport",
    "Place",
    "Plane",
    "Power",
    "Refit",
    "Report",
    "Rescale",
    "SinkhornRebasin",
    "Space",
    "StraightThrough",
    "Streamed",
    "Structure",
    "StructureError",
    "WeightMatching",
    "WeldnetError",
    "WidthError",
    "__version__",
    "align",
    "average",
    "barrier",
    "capture",
    "check",
    "compare",
    "diagnose",
    "distil",
    "evaluate",
    "fine_tune",
    "fold",
    "fuse",
    "fuse_files",
    "load",
    "load_model",
    "plane",
    "power",
    "transport",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'weldnet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
