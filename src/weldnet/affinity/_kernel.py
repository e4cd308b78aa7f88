"""Kernels: affinities of the units of some networks to the universe that all other networks fill.

Network 0 is the anchor: its units are the universe's units. With U_k the coupling of network k, shape (units, universe), and kappa the kernel summed over features,
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


class Kernel(Protocol):
    """How alike unit features are, summed over the networks that are not being scored."""

    def scores(self, rows: Tensor, couplings: Tensor, group: Sequence[int]) -> Tensor:
        """Return the affinity of every unit of the networks in ``group`` to every universe unit.

        Args:
            rows: features of all networks, shape (networks, units, d); the anchor comes first.
            couplings: of networks 1, 2, ...: a float stack (networks - 1, units, universe) or integer sources
                (networks - 1, universe).
            group: the networks to score against all others, as numbers from 1.

        Returns:
            Shape (len(group), units, universe).
        """
        ...

    def pool(self, rows: Tensor, couplings: Tensor) -> Pool:
        """Return the same scores for integer couplings that are replaced one network at a time."""
        ...


class Pool(Protocol):
    """Scores of one network after the other, each against the latest couplings of all others."""

    def scores(self, k: int) -> Tensor:
        """Return the affinity of network ``k``'s units to the universe, shape (units, universe)."""
        ...

    def replace(self, k: int, source: Tensor) -> None:
        """Give network ``k`` another coupling."""
        ...


@final
@dataclass(frozen=True)
class InnerProduct:
    """``kappa(x, y) = <x, y>``: the affinity of weight matching, and the limit of a wide Gaussian."""

    def scores(self, rows: Tensor, couplings: Tensor, group: Sequence[int]) -> Tensor:
        """Return ``<x_k, sum of the others>``; see :class:`Kernel`."""
        return _product_scores(iter([rows]), couplings, group)

    def pool(self, rows: Tensor, couplings: Tensor) -> Pool:
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
    tolerance: float = 1e-4

    def scores(self, rows: Tensor, couplings: Tensor, group: Sequence[int]) -> Tensor:
        """Return the summed kernel; see :class:`Kernel`."""
        flat = rows.flatten(0, 1)
        terms = expansion_terms(flat, flat, self.sigma, tolerance=self.tolerance) if self.tolerance else None
        if terms is None:
            return _pair_scores(lambda a, b: exact_gaussian_affinity(a, b, self.sigma), rows, couplings, group)
        return _product_scores(gaussian_features(rows, self.sigma, terms), couplings, group)

    def pool(self, rows: Tensor, couplings: Tensor) -> Pool:
        """Pool the terms of the expansion; see :class:`Kernel`."""
        flat = rows.flatten(0, 1)
        terms = expansion_terms(flat, flat, self.sigma, tolerance=self.tolerance) if self.tolerance else None
        if terms is None:
            return _PairPool(lambda a, b: exact_gaussian_affinity(a, b, self.sigma), rows, couplings)
        return _ProductPool(lambda x: gaussian_features(x, self.sigma, terms), rows, couplings)


@final
@dataclass(frozen=True)
class VectorNorm:
    """The authors' code's affinity on whole unit vectors, for comparison; quadratic in the number of networks."""

    def scores(self, rows: Tensor, couplings: Tensor, group: Sequence[int]) -> Tensor:
        """Return the summed affinity; see :class:`Kernel`."""
        return _pair_scores(vector_affinity, rows, couplings, group)

    def pool(self, rows: Tensor, couplings: Tensor) -> Pool:
        """Compare pair by pair; see :class:`Kernel`."""
        return _PairPool(vector_affinity, rows, couplings)


class _ProductPool:
    """Keeps, for each term, the sum of all networks' features in the universe: linear in the number of networks."""

    def __init__(self, features: Callable[[Tensor], Iterator[Tensor]], rows: Tensor, couplings: Tensor) -> None:
        self._features, self._rows, self._couplings = features, rows, couplings.clone()
        self._totals: list[Tensor] = []
        if len(rows) > 2:
            self._totals = [phi.clone() for phi in features(rows[0])]
            for k in range(1, len(rows)):
                self._add(k, 1.0)

    def scores(self, k: int) -> Tensor:
        if not self._totals:  # the anchor is the only other network
            pairs = zip(self._features(self._rows[k]), self._features(self._rows[0]), strict=True)
        else:
            own = self._couplings[k - 1]
            pairs = (
                (phi, total - to_universe(phi, own))
                for phi, total in zip(self._features(self._rows[k]), self._totals, strict=True)
            )
        result = self._rows.new_zeros(self._rows.shape[1], self._rows.shape[1])
        for phi, rest in pairs:
            result.addmm_(phi, rest.T)
        return result

    def replace(self, k: int, source: Tensor) -> None:
        if self._totals:
            self._add(k, -1.0)
        self._couplings[k - 1] = source
        if self._totals:
            self._add(k, 1.0)

    def _add(self, k: int, sign: float) -> None:
        for phi, total in zip(self._features(self._rows[k]), self._totals, strict=True):
            total.add_(to_universe(phi, self._couplings[k - 1]), alpha=sign)


class _PairPool:
    """Compares every pair of networks: quadratic in their number."""

    def __init__(self, pair: Callable[[Tensor, Tensor], Tensor], rows: Tensor, couplings: Tensor) -> None:
        self._pair, self._rows, self._couplings = pair, rows, couplings.clone()

    def scores(self, k: int) -> Tensor:
        return _pair_scores(self._pair, self._rows, self._couplings, [k])[0]

    def replace(self, k: int, source: Tensor) -> None:
        self._couplings[k - 1] = source


def to_universe(rows: Tensor, coupling: Tensor) -> Tensor:
    """Carry unit rows (..., units, d) to the universe along couplings (float stack or integer sources)."""
    if coupling.dtype == torch.int64:
        return rows.gather(-2, coupling.unsqueeze(-1).expand(*coupling.shape, rows.shape[-1]))
    return coupling.transpose(-2, -1) @ rows


def _product_scores(features: Iterator[Tensor], couplings: Tensor, group: Sequence[int]) -> Tensor:
    scores: Tensor | None = None
    chosen = list(group)
    others = [k for k in range(1, len(couplings) + 1) if k not in set(chosen)]
    for phi in features:
        rest = phi[:1]
        if others:
            rest = rest + to_universe(phi[others], couplings[[k - 1 for k in others]]).sum(0, keepdim=True)
        if len(chosen) > 1:  # the members of the group see one another too
            own = to_universe(phi[chosen], couplings[[k - 1 for k in chosen]])
            rest = rest + own.sum(0, keepdim=True) - own
        if scores is None:
            scores = phi[chosen] @ rest.transpose(-2, -1)
        else:
            scores.baddbmm_(phi[chosen], rest.transpose(-2, -1))
    if scores is None:
        raise AssertionError("a kernel has at least one term")
    return scores


def _pair_scores(
    pair: Callable[[Tensor, Tensor], Tensor], rows: Tensor, couplings: Tensor, group: Sequence[int]
) -> Tensor:
    result: list[Tensor] = []
    for k in group:
        total = pair(rows[k], rows[0])
        for other in range(1, len(rows)):
            if other != k:
                total = total + to_universe(pair(rows[k], rows[other]).T, couplings[other - 1]).T
        result.append(total)
    return torch.stack(result)
