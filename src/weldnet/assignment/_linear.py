"""The linear assignment problem."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weldnet.errors import AlignmentError

__all__ = ["best_permutation"]


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
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise AlignmentError(f"scores of shape {tuple(scores.shape)} are not square; a permutation needs equal widths")
    if not bool(torch.isfinite(scores).all()):
        raise AlignmentError(f"scores of shape {tuple(scores.shape)} hold NaN or Inf; are the weights finite?")
    _, columns = linear_sum_assignment(scores.T.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)
