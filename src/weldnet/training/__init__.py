"""Supervised training of image classifiers: seeded, resumable, quick on a CPU.

The library's own networks for demos and studies are trained with this; fusing never trains.
"""

from __future__ import annotations

from weldnet.training._recipe import Recipe
from weldnet.training._run import Epoch, TrainingResult, initialise, train

__all__ = ["Epoch", "Recipe", "TrainingResult", "initialise", "train"]
