"""Sinkhorn: the softest doubly stochastic matrix that still prefers high scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Potentials", "sinkhorn", "spread", "standardise"]


class Potentials(NamedTuple):
    """Row and column potentials in the unit of the scores, shapes (..., m) and (..., n): a warm start."""

    row: Tensor
    column: Tensor


def standardise(scores: Tensor) -> Tensor:
    """Remove row and column means and divide by the standard deviation, so that a temperature has no unit.

    Row and column offsets change neither the linear assignment nor Sinkhorn's plan.

    Args:
        scores: shape (..., m, n).

    Returns:
        The same shape; zeros where all scores are equal.
    """
    return spread(scores)[0]


def spread(scores: Tensor, *, pooled: bool = False) -> tuple[Tensor, Tensor]:
    """Standardise scores, and return the standard deviation too; ``pooled``: one for all members of a stack.

    Returns:
        Scores as :func:`standardise` gives them, and deviations of shape (..., 1, 1), or () if pooled.
    """
    centred = scores - scores.mean(-1, keepdim=True)
    centred.sub_(centred.mean(-2, keepdim=True))
    axes = None if pooled else (-2, -1)
    count = centred.numel() if pooled else centred.shape[-2] * centred.shape[-1]
    deviation = torch.linalg.vector_norm(centred, dim=axes, keepdim=not pooled) / max(count, 1) ** 0.5
    size = torch.linalg.vector_norm(scores, ord=math.inf, dim=axes, keepdim=not pooled)
    info = torch.finfo(scores.dtype)
    noise = 8 * info.eps * size
    return centred.div_(deviation.clamp_min(info.tiny)).masked_fill_(~(deviation > noise), 0.0), deviation


def sinkhorn(
    scores: Tensor,
    temperature: float,
    *,
    iterations: int = 20,
    start: Potentials | None = None,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Potentials]:
    """Maximise ``<P, scores> + temperature * entropy(P)`` over doubly stochastic P.

    Potentials are kept in the log domain; between two absorptions the iteration is a pair of matrix-vector
    products, which costs far less than a pair of log-sum-exps. Where that overflows, all of it is done in the log
    domain.

    Args:
        scores: shape (..., n, n); a stack is solved at once.
        temperature: in the unit of the scores, above 0.
        iterations: row and column scalings at most.
        start: potentials of an earlier, similar problem.
        tolerance: stop when all row sums are within this of 1.

    Returns:
        The plan, rows and columns summing to 1 (columns exactly, rows within what the iterations reached), and
        the potentials.

    Source: Cuturi 2013; absorption as in Schmitzer 2019 (https://arxiv.org/abs/1610.06519).
    """
    column = scores.new_zeros(scores.shape[:-2] + scores.shape[-1:]) if start is None else start.column
    kernel, row, column = _absorbed(scores, temperature, column)
    across = kernel.transpose(-2, -1)
    left, right = torch.ones_like(row), torch.ones_like(column)
    for _ in range(iterations - 1):
        sums = _times(kernel, right)
        if float(torch.linalg.vector_norm((left * sums).sub_(1), ord=math.inf)) < tolerance:
            break
        left = sums.reciprocal_()
        right = _times(across, left).reciprocal_()
    extreme = torch.finfo(scores.dtype).max ** 0.5
    if not all(bool(((s > 1 / extreme) & (s < extreme)).all()) for s in (left, right)):
        return _log_sinkhorn(scores, temperature, iterations, Potentials(row, column))
    plan = kernel.mul_(left.unsqueeze(-1)).mul_(right.unsqueeze(-2))
    return plan, Potentials(row - temperature * left.log(), column - temperature * right.log())


def _absorbed(scores: Tensor, temperature: float, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale rows, then columns, once; return the scaled matrix, and row and column potentials.

    One exponential a score is enough, unless all of a column is so far below the rows' largest that nothing is left.
    """
    kernel = (scores - column.unsqueeze(-2)).div_(temperature)
    highest = kernel.amax(-1, keepdim=True)
    kernel.sub_(highest).exp_()
    rows = kernel.sum(-1, keepdim=True)
    columns = kernel.div_(rows).sum(-2, keepdim=True)
    row = temperature * (highest + rows.log()).squeeze(-1)
    if float(columns.amin()) > torch.finfo(scores.dtype).tiny ** 0.5:
        return kernel.div_(columns), row, column + temperature * columns.log().squeeze(-2)
    column = temperature * torch.logsumexp((scores - row.unsqueeze(-1)) / temperature, dim=-2)
    return ((scores - row.unsqueeze(-1) - column.unsqueeze(-2)) / temperature).exp(), row, column


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector) if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _log_sinkhorn(scores: Tensor, temperature: float, iterations: int, start: Potentials) -> tuple[Tensor, Potentials]:
    row, column = start
    for _ in range(iterations):
        row = temperature * torch.logsumexp((scores - column.unsqueeze(-2)) / temperature, dim=-1)
        column = temperature * torch.logsumexp((scores - row.unsqueeze(-1)) / temperature, dim=-2)
    # The softmax is exp((scores - row - column) / temperature), but rounding of the column potentials cannot blow up.
    return torch.softmax((scores - row.unsqueeze(-1)) / temperature, dim=-2), Potentials(row, column)
