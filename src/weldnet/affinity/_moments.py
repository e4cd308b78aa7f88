"""Moments: how units vary together over samples, from sums that one pass over the samples gives."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

__all__ = ["LIKENESSES", "CrossMoments", "Likeness"]

Likeness = Literal["correlation", "covariance", "product"]
LIKENESSES = ("correlation", "covariance", "product")

#: A unit whose variance is below this share of its mean square does not vary: what is left is rounding in float32.
_STILL = 1e-12


@final
class CrossMoments:
    """Running sums over paired samples of the units of two networks, in float64.

    Sums are taken around the first samples' means, so that units far from zero lose no digits.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._centres: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in samples of shapes (rows, units of x) and (rows, units of y), row by row of the same input."""
        x, y = x.double(), y.double()
        if self._centres is None:
            self._centres = x.mean(0), y.mean(0)
        x, y = x - self._centres[0], y - self._centres[1]
        new = [x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y]
        self._sums = [old + more for old, more in zip(self._sums, new, strict=True)] if self._sums else new
        self.samples += len(x)

    def scores(self, likeness: Likeness) -> Tensor:
        """Return how alike the units are, shape (units of x, units of y).

        ``correlation`` is 0 for units that do not vary. ``covariance`` and ``product`` (of the values as they are) are
        divided by the root mean squares over all units, so that the scores of several layers can be added.
        """
        assert self._centres is not None
        count = self.samples
        mean_x, mean_y, square_x, square_y, both = (total / count for total in self._sums)
        covariance = both - mean_x[:, None] * mean_y[None, :]
        variances = [square_x - mean_x.square(), square_y - mean_y.square()]
        wholes = [m + c for m, c in zip((mean_x, mean_y), self._centres, strict=True)]
        squares = [v.clamp_min(0) + w.square() for v, w in zip(variances, wholes, strict=True)]
        if likeness == "product":
            return _scaled(covariance + wholes[0][:, None] * wholes[1][None, :], squares)
        if likeness == "covariance":
            return _scaled(covariance, [v.clamp_min(0) for v in variances])
        rates = [torch.where(v > _STILL * s, v, torch.inf).rsqrt() for v, s in zip(variances, squares, strict=True)]
        return rates[0][:, None] * covariance * rates[1][None, :]


def _scaled(scores: Tensor, squares: list[Tensor]) -> Tensor:
    size = squares[0].mean().sqrt() * squares[1].mean().sqrt()
    return scores / size if size > 0 else torch.zeros_like(scores)
