"""The sums of an epoch, fetched from a GPU many at a time."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from weldnet.errors import TrainingError
from weldnet.training._recipe import Recipe

__all__ = ["Tally"]

#: So many steps may run on a GPU before their losses are looked at.
_AHEAD = 50


@final
class Tally:
    """Losses and right answers of an epoch.

    The CPU waits when it fetches a number from a GPU; so numbers are fetched many at a time, and a loss that is not
    finite is noticed a little later there.
    """

    def __init__(self, epoch: int, recipe: Recipe) -> None:
        self.loss = self.correct = self.seen = 0.0
        self._epoch, self._recipe, self._settled = epoch, recipe, 0
        self._waiting: list[tuple[Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, right: Tensor | float, count: int) -> None:
        """Take in a step: its mean loss, and how many of its samples were answered rightly."""
        self._waiting.append((loss, torch.as_tensor(right), count))
        if loss.device.type == "cpu" or len(self._waiting) >= _AHEAD:
            self.settle()

    def settle(self) -> None:
        """Fetch and sum up what was taken in.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._waiting:
            return
        losses, right, counts = zip(*self._waiting, strict=True)
        self._waiting = []
        fetched = (torch.stack(found).cpu().tolist() for found in (losses, right))
        for loss, correct, count in zip(*fetched, counts, strict=True):
            self._settled += 1
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} in epoch {self._epoch}, step {self._settled}; lower the learning rate "
                    f"({self._recipe.lr}) or check the images for values that are not finite"
                )
            self.loss += loss * count
            self.correct += correct
            self.seen += count
