"""How good networks are, and how well two or three of them are connected."""

from __future__ import annotations

from weldnet._modules import evaluation_mode
from weldnet.evaluation._barrier import Barrier, barrier
from weldnet.evaluation._metrics import (
    Evaluation,
    Metrics,
    agreement,
    calibration_error,
    ensemble_metrics,
    evaluate,
    evaluate_together,
    predict_logits,
)
from weldnet.evaluation._plane import Plane, plane
from weldnet.evaluation._predict import Labelled, labelled_batches
from weldnet.evaluation._scorer import Measure

__all__ = [
    "Barrier",
    "Evaluation",
    "Labelled",
    "Measure",
    "Metrics",
    "Plane",
    "agreement",
    "barrier",
    "calibration_error",
    "ensemble_metrics",
    "evaluate",
    "evaluate_together",
    "evaluation_mode",
    "labelled_batches",
    "plane",
    "predict_logits",
]
