"""Assignment of nested units: the units of a space are blocks of another, and what is inside a block moves with it.

An outer coupling P says which block goes where; an inner one Q[a, u] says what happens inside when block a goes to
block u. The whole coupling of the nested units is ``P[a, u] Q[a, u]``, block by block. All pairs of blocks are solved
at once as a stack; nothing is ever larger than the whole coupling.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weldnet.assignment._sinkhorn import Potentials, sinkhorn, spread

__all__ = ["BlockPlans", "as_blocks", "as_matrix", "best_inside", "block_sinkhorn", "fit_inside", "unfold"]

#: Up to this block size all inner permutations are tried at once, as array operations.
_ENUMERATED = 4


def as_blocks(scores: Tensor, blocks: int) -> Tensor:
    """See scores (units, units) as (block, block, inner, inner)."""
    inner = len(scores) // blocks
    return scores.reshape(blocks, inner, blocks, inner).transpose(1, 2)


def as_matrix(source: Tensor, dtype: torch.dtype) -> Tensor:
    """See integer sources (..., units) as matrices of zeros and ones (..., units, units)."""
    return torch.nn.functional.one_hot(source, source.shape[-1]).transpose(-1, -2).to(dtype)


def unfold(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the whole coupling of nested units.

    Args:
        outer: integer sources (blocks,) or a matrix (blocks, universe blocks).
        inner: integer sources (blocks, universe blocks, inner) or matrices (blocks, universe blocks, inner, inner).

    Returns:
        Integer sources (units,) if both are integers, else a matrix (units, universe units).
    """
    if inner.dtype == torch.int64 and outer.dtype == torch.int64:
        chosen = inner[outer, torch.arange(len(outer), device=outer.device)]
        return (outer[:, None] * inner.shape[-1] + chosen).reshape(-1)
    if inner.dtype == torch.int64:
        inner = as_matrix(inner, outer.dtype)
    whole = outer[:, :, None, None] * inner
    rows, columns = whole.shape[0] * whole.shape[2], whole.shape[1] * whole.shape[3]
    return whole.transpose(1, 2).reshape(rows, columns)


def best_inside(blocks: Tensor) -> Tensor:
    """Maximise ``sum_j blocks[..., source[..., j], j]`` over permutations, for every pair of blocks.

    Args:
        blocks: shape (..., inner, inner).

    Returns:
        ``source``, integers of shape (..., inner) on the CPU.
    """
    scores = blocks.double().cpu().numpy()
    size = scores.shape[-1]
    if size <= _ENUMERATED:
        return torch.from_numpy(_enumerate(scores))
    found = np.empty(scores.shape[:-1], np.int64)
    for pair in np.ndindex(scores.shape[:-2]):
        found[pair] = linear_sum_assignment(scores[pair].T, maximize=True)[1]
    return torch.from_numpy(found)


def _enumerate(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    every = np.array(list(itertools.permutations(range(scores.shape[-1]))))
    columns = np.arange(scores.shape[-1])
    values = np.stack([scores[..., p, columns].sum(-1) for p in every], axis=-1)
    return every[values.argmax(-1)]


def fit_inside(inner: Tensor, blocks: Tensor) -> Tensor:
    """Return how well inner couplings fit scores, for every pair of blocks: the sum of the coupled units' scores.

    Args:
        inner: integer sources (..., inner) or matrices (..., inner, inner).
        blocks: scores of shape (..., inner, inner).

    Returns:
        Shape (...).
    """
    if inner.dtype == torch.int64:
        return blocks.gather(-2, inner.unsqueeze(-2)).squeeze(-2).sum(-1)
    return (inner * blocks).sum((-2, -1))


class BlockPlans(NamedTuple):
    """Soft inner couplings.

    Args:
        plans: shape (blocks, universe blocks, inner, inner).
        values: what each pair of blocks is worth to the outer coupling, shape (blocks, universe blocks).
        potentials: a warm start.
    """

    plans: Tensor
    values: Tensor
    potentials: Potentials


def block_sinkhorn(
    blocks: Tensor, temperature: float, *, iterations: int = 20, start: Potentials | None = None
) -> BlockPlans:
    """Maximise ``<Q, scores> + temperature * entropy(Q)`` over doubly stochastic Q, for every pair of blocks at once.

    The temperature is in standard deviations of all pairs' scores together, with row and column means removed pair by
    pair: pairs that fit badly stay soft. The value of a pair is that maximum, its free energy, plus what the means
    are worth: the outer problem's scores, if inner and outer couplings are sought together.

    Args:
        blocks: shape (blocks, universe blocks, inner, inner).
        temperature: above 0.
        iterations: row and column scalings at most.
        start: potentials of an earlier, similar problem.
    """
    size = blocks.shape[-1]
    offsets = blocks.mean((-2, -1)) * size
    centred, deviation = spread(blocks, pooled=True)
    plans, potentials = sinkhorn(centred, temperature, iterations=iterations, start=start)
    free = (plans.sum(-1) * potentials.row).sum(-1) + potentials.column.sum(-1)
    return BlockPlans(plans, offsets + deviation * free, potentials)
