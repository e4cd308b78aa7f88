"""Mean and variance of channels, from rows that come in parts."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

__all__ = ["ChannelSums"]


@final
class ChannelSums:
    """Running sums over rows, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = torch.zeros(())
        self._sum = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows, shape (rows, channels)."""
        if not self.count:
            # Sums of what differs from the first part's mean: squares of large means would swallow the variance.
            self._origin = rows.mean(0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._origin)
            self._squares = torch.zeros_like(self._origin)
        self.count += len(rows)
        shifted = rows.double() - self._origin
        self._sum += shifted.sum(0)
        self._squares += shifted.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Shape (channels,)."""
        return self._origin + self._sum / self.count

    @property
    def variance(self) -> Tensor:
        """Shape (channels,); divided by the number of rows."""
        return (self._squares / self.count - (self._sum / self.count).square()).clamp_min(0)

    @property
    def deviation(self) -> Tensor:
        """Shape (channels,); the square root of the variance."""
        return self.variance.sqrt()
