"""Clusters: which units are brought together where there is room for fewer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster"]


def cluster(
    rows: Tensor, count: int, masses: Tensor, generator: torch.Generator, *, starts: int = 4, iterations: int = 100
) -> Tensor:
    """Group rows so that ``sum_a mass[a] |row[a] - mean of its group|^2`` is small.

    Equal rows come together, and into groups of their own if there are at most ``count`` different ones.

    Args:
        rows: shape (units, d).
        count: of groups, 1 or more; some stay empty if there are fewer different rows.
        masses: how much every row counts, shape (units,), above 0.
        generator: of the starts.
        starts: how many are tried; the best one counts.
        iterations: of each, at most.

    Returns:
        The group of every row, integers of shape (units,) on the CPU.

    Source: Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007), weighted.
    """
    points, weights = rows.detach().double().cpu(), masses.detach().double().cpu()
    found = [_lloyd(points, _seeds(points, count, weights, generator), weights, iterations) for _ in range(starts)]
    return min(found, key=lambda pair: pair[1])[0]


def _seeds(points: Tensor, count: int, masses: Tensor, generator: torch.Generator) -> Tensor:
    """Draw centres, each by its distance to those before it; fewer where all rows are centres already."""
    chosen = [int(torch.multinomial(masses, 1, generator=generator))]
    nearest = _squares(points, points[chosen])[:, 0]
    while len(chosen) < count:
        odds = nearest * masses
        if float(odds.sum()) <= 1e-24 * float((points.square().sum(1) * masses).sum()):
            break
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        nearest = torch.minimum(nearest, _squares(points, points[chosen[-1:]])[:, 0])
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor, masses: Tensor, iterations: int) -> tuple[Tensor, float]:
    labels = torch.full((len(points),), -1)
    squares = _squares(points, centres)
    for _ in range(iterations):
        before, labels = labels, squares.argmin(1)
        if torch.equal(before, labels):
            break
        members = torch.nn.functional.one_hot(labels, len(centres)).to(points) * masses[:, None]
        whole = members.sum(0)
        centres = torch.where(whole[:, None] > 0, members.T @ points / whole.clamp_min(1e-300)[:, None], centres)
        squares = _squares(points, centres)
    return labels, float((squares.gather(1, labels[:, None])[:, 0] * masses).sum())


def _squares(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
