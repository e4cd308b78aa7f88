"""Exact line search: tensors that move on polynomial paths, and where their summed inner products are largest."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray
from torch import Tensor

from weldnet.structure import Structure

__all__ = ["Line", "degree", "nodes"]


def degree(structure: Structure, tensor: str) -> int:
    """Return the degree of a tensor's path when all couplings move on straight lines: how many enter at most.

    Each axis counts once for every level of nesting of its spaces.
    """
    depths: dict[tuple[tuple[int, ...], object], int] = defaultdict(int)
    for place in structure.places_in(tensor):
        side = place.axes, place.view
        depths[side] = max(depths[side], _depth(structure, place.space))
    return sum(depths.values())


def _depth(structure: Structure, space: str) -> int:
    parent = structure.space(space).parent
    return 1 if parent is None else 1 + _depth(structure, parent)


def nodes(degree: int) -> NDArray[np.float64]:
    """Return ``degree + 1`` points of [0, 1], both ends among them, that determine a polynomial stably."""
    return (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2


class Line:
    """``F(t) = sum_(k < k') <T_k(t), T_k'(t)>``, summed over tensors whose paths T_k are polynomials in t.

    With T known at the nodes of its degree, ``T(t) = sum_i l_i(t) T(t_i)`` with Lagrange's polynomials l_i, and F is a
    quadratic form in them: exact, from no more points than T itself needs.
    """

    def __init__(self) -> None:
        self._forms: dict[int, NDArray[np.float64]] = {}

    def add(self, stacks: Tensor, weight: float) -> None:
        """Take in one tensor.

        Args:
            stacks: its values at the nodes of its degree, shape (degree + 1, networks, entries).
            weight: how much it counts.
        """
        values = stacks.double()
        total = values.sum(1)
        own = torch.einsum("ike,jke->ij", values, values)
        form = weight / 2 * (total @ total.T - own).cpu().numpy()
        known = self._forms.get(len(values) - 1, 0.0)
        self._forms[len(values) - 1] = known + form

    def __call__(self, t: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return F at some points."""
        at = np.atleast_1d(np.asarray(t, np.float64))
        total = np.zeros(len(at))
        for order, form in self._forms.items():
            basis = _lagrange(nodes(order), at)
            total += np.einsum("ti,ij,tj->t", basis, form, basis)
        return total

    def highest(self) -> float:
        """Return where in [0, 1] the objective is largest: 0 if nowhere larger than there."""
        top = 2 * max(self._forms, default=0)
        if not top:
            return 0.0
        slope = Chebyshev.interpolate(self, top, domain=[0, 1]).deriv()
        roots = np.asarray(slope.roots())
        inside = roots.real[(np.abs(roots.imag) < 1e-6) & (roots.real > 0) & (roots.real < 1)]
        points = np.concatenate([[0.0, 1.0], inside])
        values = self(points)
        return float(points[values.argmax()]) if values.max() > values[0] else 0.0


def _lagrange(at_nodes: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lagrange's polynomials of the nodes at points, shape (points, nodes)."""
    basis = np.ones((len(t), len(at_nodes)))
    for i, own in enumerate(at_nodes):
        for j, other in enumerate(at_nodes):
            if i != j:
                basis[:, i] *= (t - other) / (own - other)
    return basis
