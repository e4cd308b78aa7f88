"""Affinities between the units of two networks, given one feature row a unit."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import gammainc
from torch import Tensor

__all__ = [
    "MAX_TERMS",
    "exact_gaussian_affinity",
    "expansion_terms",
    "gaussian_affinity",
    "gaussian_features",
    "vector_affinity",
]

#: Beyond this many terms the exact kernel is as fast.
MAX_TERMS = 48

_BINS = 2048
_TOP_RATE = 64.0


def gaussian_affinity(a: Tensor, b: Tensor, sigma: float, *, tolerance: float = 1e-3) -> Tensor:
    """Sum a one-dimensional Gaussian kernel over features: ``A[i,j] = sum_d exp(-(a[i,d]-b[j,d])^2 / sigma)``.

    The kernel has an exact expansion, ``exp(-(u-v)^2) = sum_r phi_r(u) phi_r(v)`` with
    ``phi_r(u) = exp(-u^2) sqrt(2^r/r!) u^r``; cut after R terms it is R matrix products in place of m*n*d
    exponentials. R is the smallest number whose proven bound meets ``tolerance``; where that takes more than
    48 terms (small sigma), the exact kernel is used.

    Args:
        a: shape (m, d).
        b: shape (n, d).
        sigma: width, in squared units of the features, above 0.
        tolerance: bound on the relative error in the Frobenius norm; what is found is about 40 times smaller.

    Returns:
        Shape (m, n).
    """
    terms = expansion_terms(a, b, sigma=sigma, tolerance=tolerance)
    if terms is None:
        return exact_gaussian_affinity(a, b, sigma)
    result = a.new_zeros(len(a), len(b))
    for left, right in zip(gaussian_features(a, sigma, terms), gaussian_features(b, sigma, terms), strict=True):
        result.addmm_(left, right.T)
    return result


def gaussian_features(x: Tensor, sigma: float, terms: int) -> Iterator[Tensor]:
    """Yield ``phi_0(x/sqrt(sigma)), ..., phi_(terms-1)``, each of x's shape: one buffer that the next overwrites."""
    u = x / math.sqrt(sigma)
    phi = u.square().neg_().exp_()
    for r in range(terms):
        yield phi
        phi.mul_(u).mul_(math.sqrt(2 / (r + 1)))


def expansion_terms(*rows: Tensor, sigma: float, tolerance: float = 1e-3) -> int | None:
    """Return how many terms bring every pair's relative error below ``tolerance``, or None if more than 48.

    The remainder after R terms is ``E = sum_(r>=R) phi_r(a) phi_r(b)^T``. By Cauchy and Schwarz
    ``|E|_F^2 <= q_R(a) q_R(b)`` with ``q_R(x) = sum_(r>=R) |phi_r(x)|^2 = sum_entries P(Poisson(2 x^2/sigma) >= R)``,
    a regularised incomplete gamma function. By Jensen's inequality, twice, the affinities' own norm is at least
    ``sqrt(m n) d exp(-mean squared distance / sigma)``. The tail is read off a histogram of the rates with every entry
    moved to its bin's upper edge, which can only enlarge the bound.

    Args:
        rows: two feature matrices or more, each of shape (units, d).
        sigma: width, in squared units of the features, above 0.
        tolerance: bound on the relative error in the Frobenius norm.
    """
    orders = np.arange(1, MAX_TERMS + 1)
    tails = [_tail(x, sigma) for x in rows]
    squares = [float(x.square().mean(dtype=torch.float64)) for x in rows]
    means = [x.mean(0, dtype=torch.float64) for x in rows]
    bound = np.zeros(len(orders))
    for i, j in itertools.combinations(range(len(rows)), 2):
        distance = squares[i] + squares[j] - 2 * float((means[i] * means[j]).mean())
        norm = math.sqrt(len(rows[i]) * len(rows[j])) * rows[i].shape[1] * math.exp(-min(distance / sigma, 700.0))
        bound = np.maximum(bound, np.sqrt(tails[i] * tails[j]) / max(norm, 1e-300))
    enough = np.flatnonzero(bound <= tolerance)
    return int(orders[enough[0]]) if enough.size else None


def _tail(x: Tensor, sigma: float) -> np.ndarray:
    """Bound ``sum_entries P(Poisson(2 x^2/sigma) >= R)`` from above, for R = 1 .. 48."""
    bins = x.square().mul_(2 * _BINS / (sigma * _TOP_RATE)).clamp_(max=_BINS - 1).long().flatten()
    return _poisson_tails() @ torch.bincount(bins, minlength=_BINS).double().cpu().numpy()


@functools.cache
def _poisson_tails() -> np.ndarray:
    """P(Poisson(rate) >= R), shape (R, bins), at the bins' upper edges; the last bin holds all larger rates: 1.

    Every edge is moved up by half a bin, which covers the rounding of the histogram.
    """
    edges = (np.arange(1, _BINS + 1) + 0.5) * _TOP_RATE / _BINS
    table = gammainc(np.arange(1, MAX_TERMS + 1)[:, None], edges[None, :])
    table[:, -1] = 1.0
    return table


def exact_gaussian_affinity(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Compute :func:`gaussian_affinity` entry by entry, in blocks of bounded memory."""
    result = a.new_empty(len(a), len(b))
    rows = max(1, 2**22 // max(1, b.numel()))
    for start in range(0, len(a), rows):
        difference = a[start : start + rows, None, :] - b[None, :, :]
        result[start : start + rows] = difference.square_().div_(-sigma).exp_().sum(-1)
    return result


def vector_affinity(a: Tensor, b: Tensor) -> Tensor:
    """Compare whole unit vectors: ``exp(-0.5 |a_i - b_j|_4)``, divided by its mean.

    This is what the authors' published GAMF code computes in place of the paper's kernel. The fourth power of the
    4-norm is a polynomial in a and b, so that five matrix products in float64 give it.

    Args:
        a: shape (m, d).
        b: shape (n, d).

    Returns:
        Shape (m, n), mean 1.
    """
    x, y = a.double(), b.double()
    fourth = x.pow(4).sum(-1)[:, None] + y.pow(4).sum(-1)[None, :]
    fourth = fourth - 4 * (x.pow(3) @ y.T) + 6 * (x.square() @ y.square().T) - 4 * (x @ y.pow(3).T)
    affinity = (-0.5 * fourth.clamp_min(0).pow(0.25)).exp()
    return (affinity / affinity.mean()).to(a.dtype)
