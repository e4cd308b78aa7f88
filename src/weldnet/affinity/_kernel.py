"""Kernels: affinities of one network's units to the universe that all other networks fill.

Network 0 is the anchor: its units are the universe's units. With U_k the coupling of network k, shape (units,
universe), and kappa the kernel summed over features,
``A_k[a, u] = sum_(k' != k) sum_b kappa(x_k[a], x_k'[b]) U_k'[b, u]``. A kernel of the form
``sum_r phi_r(x) phi_r(y)`` needs only the sum of the other networks' transported features, so that the cost is linear
in the number of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from weldnet.affinity._pairs import (
    exact_gaussian_affinity,
    expansion_terms,
    gaussian_features,
    vector_affinity,
)

__all__ = ["Gaussian", "InnerProduct", "Kernel", "Pool", "VectorNorm"]

#: A coupling is integer sources (universe,), or a soft matrix (units, universe).
Couplings = Sequence[Tensor]


class Kernel(Protocol):
    """How alike unit features are."""

    def pool(self, rows: Sequence[Tensor], couplings: Couplings) -> Pool:
        """Put all networks' features together.

        Args:
            rows: features of every network, each of shape (units, d); the anchor comes first.
            couplings: of networks 1, 2, ...: integer sources (universe,) or soft matrices (units, universe).
        """
        ...


class Pool(Protocol):
    """Scores of one network after the other, each against the latest couplings of all others."""

    def scores(self, k: int) -> Tensor:
        """Return the affinity of network ``k``'s units to the universe, shape (units, universe); k counts from 1."""
        ...

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        """Give network ``k`` another coupling, and other features where ``rows`` are given."""
        ...


@final
@dataclass(frozen=True)
class InnerProduct:
    """``kappa(x, y) = <x, y>``: the affinity of weight matching, and the limit of a wide Gaussian."""

    def pool(self, rows: Sequence[Tensor], couplings: Couplings) -> Pool:
        """Pool the rows themselves; see :class:`Kernel`."""
        return _ProductPool(lambda x: iter([x]), rows, couplings)


@final
@dataclass(frozen=True)
class Gaussian:
    """``kappa(x, y) = sum_d exp(-(x_d - y_d)^2 / sigma)``, GAMF's edge affinity.

    Args:
        sigma: width in squared units of the features.
        tolerance: relative error bound of the fast expansion; 0 forces the exact kernel.
    """

    sigma: float
    tolerance: float = 1e-3

    def pool(self, rows: Sequence[Tensor], couplings: Couplings) -> Pool:
        """Pool the terms of the expansion; see :class:`Kernel`."""
        terms = expansion_terms(*rows, sigma=self.sigma, tolerance=self.tolerance) if self.tolerance else None
        if terms is None:
            return _PairPool(lambda a, b: exact_gaussian_affinity(a, b, self.sigma), rows, couplings)
        return _ProductPool(lambda x: gaussian_features(x, self.sigma, terms), rows, couplings)


@final
@dataclass(frozen=True)
class VectorNorm:
    """The authors' code's affinity on whole unit vectors, for comparison; quadratic in the number of networks."""

    def pool(self, rows: Sequence[Tensor], couplings: Couplings) -> Pool:
        """Compare pair by pair; see :class:`Kernel`."""
        return _PairPool(vector_affinity, rows, couplings)


def to_universe(rows: Tensor, coupling: Tensor) -> Tensor:
    """Carry unit rows (units, d) to the universe along a coupling (integer sources or a soft matrix)."""
    return rows[coupling] if coupling.dtype == torch.int64 else coupling.T @ rows


class _ProductPool:
    """Keeps, for each term, the sum of all networks' features in the universe: linear in the number of networks."""

    def __init__(
        self, features: Callable[[Tensor], Iterator[Tensor]], rows: Sequence[Tensor], couplings: Couplings
    ) -> None:
        self._features, self._rows, self._couplings = features, list(rows), list(couplings)
        self._totals: list[Tensor] = []
        self._known: dict[int, Tensor] = {}  # what one-term kernels have carried already
        if len(rows) > 2:  # else the anchor is the only other network, and there is nothing to sum
            self._totals = [phi.clone() for phi in features(rows[0])]
            for k in range(1, len(rows)):
                for total, own in zip(self._totals, self._transported(k), strict=True):
                    total.add_(own)

    def scores(self, k: int) -> Tensor:
        result = self._rows[k].new_zeros(len(self._rows[k]), len(self._rows[0]))
        for phi, rest in zip(self._features(self._rows[k]), self._rest(k), strict=True):
            result.addmm_(phi, rest.T)
        return result

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        for total, own in zip(self._totals, self._transported(k) if self._totals else (), strict=True):
            total.sub_(own)
        if rows is not None:
            self._rows[k] = rows
        self._couplings[k - 1] = coupling
        if not self._totals:
            return
        self._known.pop(k, None)
        for total, own in zip(self._totals, self._transported(k), strict=True):
            total.add_(own)

    def _rest(self, k: int) -> Iterator[Tensor]:
        if not self._totals:
            return self._features(self._rows[0])
        return (total - own for total, own in zip(self._totals, self._transported(k), strict=True))

    def _transported(self, k: int) -> Iterator[Tensor]:
        if k in self._known:
            yield self._known[k]
            return
        for phi in self._features(self._rows[k]):
            own = to_universe(phi, self._couplings[k - 1])
            if len(self._totals) == 1:
                self._known[k] = own
            yield own


class _PairPool:
    """Compares every pair of networks: quadratic in their number."""

    def __init__(self, pair: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Tensor], couplings: Couplings) -> None:
        self._pair, self._rows, self._couplings = pair, list(rows), list(couplings)

    def scores(self, k: int) -> Tensor:
        total = self._pair(self._rows[k], self._rows[0])
        for other in range(1, len(self._rows)):
            if other != k:
                affinity = self._pair(self._rows[k], self._rows[other])
                total = total + to_universe(affinity.T, self._couplings[other - 1]).T
        return total

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        self._couplings[k - 1] = coupling
        if rows is not None:
            self._rows[k] = rows
