"""How good networks are, and how well two of them are connected."""

from __future__ import annotations

from weldnet.evaluation._barrier import Barrier, barrier
from weldnet.evaluation._metrics import (
    Labelled,
    Metrics,
    agreement,
    ensemble_metrics,
    evaluate,
    evaluation_mode,
    predict_logits,
)

__all__ = [
    "Barrier",
    "Labelled",
    "Metrics",
    "agreement",
    "barrier",
    "ensemble_metrics",
    "evaluate",
    "evaluation_mode",
    "predict_logits",
]
