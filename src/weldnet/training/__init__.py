"""Seeded, resumable training of classifiers, quick on a CPU: from scratch, and after fusing.

The library's own networks for demos and studies are trained with `train`; fusing never trains. `fine_tune` and `distil`
go on from a fused network.
"""

from __future__ import annotations

from weldnet.training._after import DISTILLING, FINE_TUNING, distil, fine_tune
from weldnet.training._objective import Labels, Objective
from weldnet.training._recipe import Recipe
from weldnet.training._run import Epoch, TrainingResult, initialise, run, train

__all__ = [
    "DISTILLING",
    "FINE_TUNING",
    "Epoch",
    "Labels",
    "Objective",
    "Recipe",
    "TrainingResult",
    "distil",
    "fine_tune",
    "initialise",
    "run",
    "train",
]
