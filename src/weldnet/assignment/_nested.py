"""Assignment of nested units: blocks are matched as wholes, and their units inside the matched blocks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weldnet.assignment._linear import best_permutation

__all__ = ["Nest", "best_nested_permutations"]

Floats = NDArray[np.float64]

#: Up to this block size all inner permutations are tried at once, as array operations.
_ENUMERATED = 4


@dataclass(frozen=True)
class Nest:
    """Scores of one space and of the spaces whose blocks are its units.

    Args:
        name: of the space.
        scores: shape (units, units): how well network unit a fits universe unit u.
        children: nested spaces; each has a whole number of units for each unit of this one, block by block.
    """

    name: str
    scores: Tensor
    children: tuple[Nest, ...] = ()


def best_nested_permutations(nest: Nest) -> dict[str, Tensor]:
    """Maximise the summed scores of a space and everything nested in it.

    One assignment a pair of blocks, then one over the blocks on the resulting values: exact, from the leaves up.

    Returns:
        ``source`` of every space by name, as :func:`best_permutation` gives it.
    """
    if not nest.children:
        return {nest.name: best_permutation(nest.scores)}
    found: dict[str, Tensor] = {}
    totals: dict[str, Floats] = {}
    source = best_permutation(torch.from_numpy(_total(nest, totals)))
    _descend(nest, source, totals, found)
    return found


def _total(nest: Nest, totals: dict[str, Floats]) -> Floats:
    """Own scores plus, for every pair of units, the best that their blocks of children can reach."""
    total = nest.scores.double().cpu().numpy().copy()
    units = len(total)
    for child in nest.children:
        inner = _blocks(_total(child, totals), units)
        total += _values(inner)
    totals[nest.name] = total
    return total


def _descend(nest: Nest, source: Tensor, totals: dict[str, Floats], found: dict[str, Tensor]) -> None:
    found[nest.name] = source
    for child in nest.children:
        inner = _blocks(totals[child.name], len(source))
        block = inner.shape[-1]
        parts = [
            int(a) * block + best_permutation(torch.from_numpy(inner[a, u])) for u, a in enumerate(source.tolist())
        ]
        _descend(child, torch.cat(parts), totals, found)


def _blocks(scores: Floats, units: int) -> Floats:
    """See scores (n, n) as (block, block, inner, inner)."""
    block = len(scores) // units
    return scores.reshape(units, block, units, block).transpose(0, 2, 1, 3)


def _values(inner: Floats) -> Floats:
    """The best assignment value of every pair of blocks, shape (blocks, blocks)."""
    block = inner.shape[-1]
    if block <= _ENUMERATED:
        every = list(itertools.permutations(range(block)))
        return np.max([inner[:, :, p, range(block)].sum(-1) for p in every], axis=0)
    values = np.empty(inner.shape[:2])
    for a, u in np.ndindex(values.shape):
        rows, columns = linear_sum_assignment(inner[a, u], maximize=True)
        values[a, u] = inner[a, u][rows, columns].sum()
    return values
