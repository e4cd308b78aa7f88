"""The linear assignment problem."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weldnet.errors import AlignmentError

__all__ = ["Table", "best_permutation", "score_table", "solve_table"]

#: Scores as the solver takes them: float64, shape (universe units, network units).
Table = NDArray[np.float64]


def best_permutation(scores: Tensor) -> Tensor:
    """Maximise ``sum_u scores[source[u], u]`` over permutations.

    Args:
        scores: shape (network units, universe units), square and finite.

    Returns:
        ``source``, integers of shape (universe units,) on the CPU.

    Raises:
        AlignmentError: the scores are not square or not finite.

    Source: Jonker and Volgenant's algorithm in ``scipy.optimize.linear_sum_assignment``.
    """
    return solve_table(score_table(scores))


def score_table(scores: Tensor) -> Table:
    """Make what :func:`solve_table` takes, and check it: all of :func:`best_permutation` that torch computes."""
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise AlignmentError(f"scores of shape {tuple(scores.shape)} are not square; a permutation needs equal widths")
    if not bool(torch.isfinite(scores).all()):
        raise AlignmentError(f"scores of shape {tuple(scores.shape)} hold NaN or Inf; are the weights finite?")
    return scores.T.double().cpu().numpy()


def solve_table(table: Table) -> Tensor:
    """Solve without a call to torch's kernels and without Python's lock, so that threads can do it side by side."""
    _, columns = linear_sum_assignment(table, maximize=True)
    return torch.from_numpy(columns)
