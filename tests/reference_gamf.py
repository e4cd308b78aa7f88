"""GAMF as published (Liu et al., ICML 2022), slowly: an oracle for the tests that shares no code with weldnet.

A network is a chain of matrices ``W[0], W[1], ...`` without biases, each of shape (in, out), as in the paper;
space i lies between ``W[i]`` and ``W[i + 1]``. Everything is a plain loop over entries in float64. Couplings have
shape (units of the network, units of the target).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

Matrix = NDArray[np.float64]
Chain = Sequence[Matrix]


def carried(chain: Chain, layer: int, couplings: Sequence[Matrix], *, incoming: bool) -> Matrix:
    """Return ``P_(i-1)^T W_i`` or ``W_(i+1) P_(i+1)``: a layer, carried on the side away from space i."""
    if incoming:
        return couplings[layer - 1].T @ chain[layer] if layer > 0 else chain[layer]
    return chain[layer] @ couplings[layer] if layer < len(chain) - 1 else chain[layer]


def pair_affinity(
    one: Chain, two: Chain, space: int, mine: Sequence[Matrix], theirs: Sequence[Matrix], sigma: float
) -> Matrix:
    """Return ``R_i[a, b]`` of the units of two networks, whose neighbouring spaces are carried by their couplings.

    ``sum_j exp(-|(P_(i-1)^T W_i^1)[j, a] - W_i^2[j, b]|^2 / sigma)
    + sum_j exp(-|(W_(i+1)^1 P_(i+1))[a, j] - W_(i+1)^2[b, j]|^2 / sigma)``
    """
    x = carried(one, space, mine, incoming=True), carried(one, space + 1, mine, incoming=False)
    y = carried(two, space, theirs, incoming=True), carried(two, space + 1, theirs, incoming=False)
    affinity = np.zeros((one[space].shape[1], two[space].shape[1]))
    for a in range(affinity.shape[0]):
        for b in range(affinity.shape[1]):
            for j in range(x[0].shape[0]):
                affinity[a, b] += math.exp(-((x[0][j, a] - y[0][j, b]) ** 2) / sigma)
            for j in range(x[1].shape[1]):
                affinity[a, b] += math.exp(-((x[1][a, j] - y[1][b, j]) ** 2) / sigma)
    return affinity


def universe_affinity(
    chains: Sequence[Chain], k: int, space: int, couplings: Sequence[Sequence[Matrix]], sigma: float
) -> Matrix:
    """Return ``R_i^(k)[a, u] = sum_(k' != k) sum_b R_i^(k, k')[a, b] U_i^(k')[b, u]``."""
    units = chains[k][space].shape[1]
    total = np.zeros((units, units))
    for other in range(len(chains)):
        if other == k:
            continue
        pair = pair_affinity(chains[k], chains[other], space, couplings[k], couplings[other], sigma)
        for a in range(units):
            for u in range(units):
                total[a, u] += sum(pair[a, b] * couplings[other][space][b, u] for b in range(units))
    return total


def sinkhorn_projector(scores: Matrix, tau: float, rounds: int = 200) -> Matrix:
    log = scores / tau
    for _ in range(rounds):
        log = log - logsumexp(log, axis=1, keepdims=True)
        log = log - logsumexp(log, axis=0, keepdims=True)
    return np.exp(log)


def hungarian_projector(scores: Matrix) -> Matrix:
    rows, columns = linear_sum_assignment(scores, maximize=True)
    matrix = np.zeros_like(scores)
    matrix[rows, columns] = 1
    return matrix


def align_two(
    one: Chain, two: Chain, sigma: float, *, tau: float = 1.0, gamma: float = 0.7, tau_min: float = 0.02
) -> list[Matrix]:
    """Run the published algorithm; return ``P_i`` of every space, shape (units of one, units of two)."""
    spaces = range(len(one) - 1)
    fixed = [np.eye(two[i].shape[1]) for i in spaces]
    plans = [np.full((one[i].shape[1], two[i].shape[1]), 1 / two[i].shape[1]) for i in spaces]
    while tau >= tau_min:
        for i in spaces:
            plans[i] = sinkhorn_projector(pair_affinity(one, two, i, plans, fixed, sigma), tau)
        tau *= gamma
    for _ in range(20):
        before = [plan.copy() for plan in plans]
        for i in spaces:
            plans[i] = hungarian_projector(pair_affinity(one, two, i, plans, fixed, sigma))
        if all(np.array_equal(p, q) for p, q in zip(plans, before, strict=True)):
            break
    return plans
