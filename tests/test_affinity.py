"""Affinities against their formulas, written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weldnet.affinity import (
    Gaussian,
    InnerProduct,
    Kernel,
    VectorNorm,
    exact_gaussian_affinity,
    expansion_terms,
    gaussian_affinity,
    vector_affinity,
)
from weldnet.affinity import _pairs as pairs

LAW = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).double().norm() / expected.double().norm())


def naive_gaussian(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    rows = [
        [sum(math.exp(-((x - y) ** 2) / sigma) for x, y in zip(i, j, strict=True)) for j in b.tolist()]
        for i in a.tolist()
    ]
    return torch.tensor(rows, dtype=a.dtype)


def naive_vector(a: Tensor, b: Tensor) -> Tensor:
    rows = [
        [math.exp(-0.5 * sum((x - y) ** 4 for x, y in zip(i, j, strict=True)) ** 0.25) for j in b.tolist()]
        for i in a.tolist()
    ]
    table = torch.tensor(rows, dtype=torch.float64)
    return (table / table.mean()).to(a.dtype)


def naive_product(a: Tensor, b: Tensor) -> Tensor:
    rows = [[sum(x * y for x, y in zip(i, j, strict=True)) for j in b.tolist()] for i in a.tolist()]
    return torch.tensor(rows, dtype=a.dtype)


# -- one pair of networks --------------------------------------------------------------------------


@LAW
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    d=st.integers(1, 5),
    sigma=st.floats(0.01, 100),
    scale=st.floats(1e-3, 30),
    seed=st.integers(0, 99),
)
def test_the_exact_kernel_is_the_triple_sum(m, n, d, sigma, scale, seed):
    a, b = scale * normal(m, d, seed=seed), scale * normal(n, d, seed=seed + 100)
    torch.testing.assert_close(
        exact_gaussian_affinity(a, b, sigma), naive_gaussian(a, b, sigma), rtol=1e-12, atol=1e-300
    )


def test_the_exact_kernel_is_the_same_in_blocks_of_any_size():
    a, b = normal(7, 2**11), normal(1500, 2**11, seed=1)  # one row a block: 1500 * 2^11 entries are close to the limit
    assert 2**22 // b.numel() < len(a)
    got = exact_gaussian_affinity(a, b, 3.0)
    expected = torch.stack([(-(row - b).square() / 3.0).exp().sum(-1) for row in a])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@LAW
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    d=st.integers(1, 60),
    ratio=st.floats(0.05, 200),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-8, 1e-11]),
    outliers=st.booleans(),
    shift=st.sampled_from([0.0, 0.7, 3.0]),
    seed=st.integers(0, 999),
)
def test_the_expansion_keeps_its_proven_bound(m, n, d, ratio, scale, tolerance, outliers, shift, seed):
    a, b = normal(m, d, seed=seed) + shift, normal(n, d, seed=seed + 1000)
    if outliers:  # a heavy tail: Student's t with about one degree of freedom
        a, b = (
            a / normal(m, d, seed=seed + 2000).abs().clamp_min(0.05),
            b / normal(n, d, seed=seed + 3000).clamp_min(0.05),
        )
    a, b, sigma = a * scale, b * scale, ratio * scale**2
    exact = exact_gaussian_affinity(a, b, sigma)
    assert relative(gaussian_affinity(a, b, sigma, tolerance=tolerance), exact) <= tolerance + 1e-13


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_a_few_wild_entries_do_not_break_the_bound(tolerance):
    a, b = normal(64, 64), normal(64, 64, seed=1)
    a[3, 5], b[7, 5], a[10, 0] = 40.0, 40.0, -25.0
    for sigma in (8.0, 16.0, 64.0):
        got = gaussian_affinity(a, b, sigma, tolerance=tolerance)
        assert relative(got, exact_gaussian_affinity(a, b, sigma)) <= tolerance


def test_the_expansion_really_is_used_and_really_is_cut():
    a, b = normal(32, 32), normal(32, 32, seed=1)
    got, exact = gaussian_affinity(a, b, 8.0, tolerance=1e-2), exact_gaussian_affinity(a, b, 8.0)
    assert 1e-12 < relative(got, exact) < 1e-2


def test_wider_kernels_need_fewer_terms():
    a, b = normal(50, 70), normal(60, 70, seed=1)
    terms = [expansion_terms(a, b, sigma=sigma, tolerance=1e-4) for sigma in (4.0, 8.0, 16.0, 64.0, 1000.0)]
    assert all(t is not None for t in terms)
    assert terms == sorted(terms, reverse=True)
    assert terms[0] > 2 * terms[-1]


def test_tighter_tolerances_need_more_terms():
    a, b = normal(50, 70), normal(60, 70, seed=1)
    terms = [expansion_terms(a, b, sigma=32.0, tolerance=t) for t in (1e-1, 1e-3, 1e-5, 1e-7)]
    assert terms == sorted(set(terms))


def test_terms_suffice_for_every_pair():
    rows = [normal(20, 30), normal(20, 30, seed=1), 4 * normal(20, 30, seed=2)]
    pairs_of = [(rows[0], rows[1]), (rows[0], rows[2]), (rows[1], rows[2])]
    assert expansion_terms(*rows, sigma=64.0) == max(expansion_terms(a, b, sigma=64.0) or 99 for a, b in pairs_of)


def test_narrow_kernels_fall_back_to_the_exact_kernel():
    a, b = normal(20, 10), normal(30, 10, seed=1)
    assert expansion_terms(a, b, sigma=0.01) is None
    assert torch.equal(gaussian_affinity(a, b, 0.01), exact_gaussian_affinity(a, b, 0.01))


def test_no_tolerance_forces_the_exact_kernel(monkeypatch):
    rows, couplings = normal(2, 5, 4), torch.arange(5).repeat(1, 1)

    def forbidden(*_: object) -> None:
        raise AssertionError("the expansion was used")

    monkeypatch.setattr("weldnet.affinity._kernel.gaussian_features", forbidden)
    exact = exact_gaussian_affinity(rows[1], rows[0], 50.0)
    assert torch.equal(Gaussian(50.0, tolerance=0).pool(rows, couplings).scores(1), exact)
    with pytest.raises(AssertionError, match="the expansion was used"):
        Gaussian(50.0).pool(rows, couplings).scores(1)


def test_the_error_on_a_large_layer_is_at_most_one_in_ten_thousand():
    a, b = normal(512, 512, dtype=torch.float32), normal(512, 512, seed=1, dtype=torch.float32)
    terms = expansion_terms(a, b, sigma=4.0)
    assert terms is not None
    assert terms <= 16  # else it would not be fast
    rows = slice(0, 512, 16)  # the error is the same everywhere; the exact kernel is slow
    assert (
        relative(gaussian_affinity(a, b, 4.0)[rows], exact_gaussian_affinity(a[rows].double(), b.double(), 4.0)) <= 1e-4
    )


def test_all_zero_features_are_alike():
    zeros = torch.zeros(3, 4)
    assert torch.equal(gaussian_affinity(zeros, zeros, 1.0), torch.full((3, 3), 4.0))


def test_features_are_the_expansion_of_the_kernel():
    x, y = 0.8, -0.6
    left = pairs.gaussian_features(torch.tensor([x], dtype=torch.float64), 2.0, 30)
    right = pairs.gaussian_features(torch.tensor([y], dtype=torch.float64), 2.0, 30)
    total = sum(float(p * q) for p, q in zip(left, right, strict=True))
    assert total == pytest.approx(math.exp(-((x - y) ** 2) / 2.0), rel=1e-14)


@LAW
@given(m=st.integers(1, 6), n=st.integers(1, 6), d=st.integers(1, 5), scale=st.floats(1e-2, 5), seed=st.integers(0, 99))
def test_vector_affinity_is_its_formula(m, n, d, scale, seed):
    a, b = scale * normal(m, d, seed=seed), scale * normal(n, d, seed=seed + 100)
    torch.testing.assert_close(vector_affinity(a, b), naive_vector(a, b), rtol=1e-6, atol=1e-12)


def test_vector_affinity_is_largest_for_equal_units():
    a = normal(6, 30)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(vector_affinity(a, a[order]).argmax(0), order)
    assert float(vector_affinity(a, a[order]).mean()) == pytest.approx(1.0)


# -- several networks ------------------------------------------------------------------------------

#: (kernel, the affinity of two networks' units as plain loops, relative error allowed)
KERNELS: list[tuple[Kernel, Callable[[Tensor, Tensor], Tensor], float]] = [
    (InnerProduct(), naive_product, 1e-12),
    (Gaussian(2.0, tolerance=0), lambda a, b: naive_gaussian(a, b, 2.0), 1e-12),
    (Gaussian(20.0, tolerance=1e-10), lambda a, b: naive_gaussian(a, b, 20.0), 1e-9),
    (Gaussian(0.01), lambda a, b: naive_gaussian(a, b, 0.01), 1e-12),
    (VectorNorm(), naive_vector, 1e-6),
]
by_kernel = pytest.mark.parametrize(("kernel", "pair", "error"), KERNELS, ids=[repr(k) for k, _, _ in KERNELS])


def naive_scores(pair: Callable[[Tensor, Tensor], Tensor], rows: Tensor, matrices: list[Tensor], k: int) -> Tensor:
    """``A_k[a, u] = sum_(k' != k) sum_b kappa(x_k[a], x_k'[b]) U_k'[b, u]``, with all networks' U in ``matrices``."""
    count, units, _ = rows.shape
    table = torch.zeros(units, units, dtype=rows.dtype)
    for other in range(count):
        if other == k:
            continue
        kappa = pair(rows[k], rows[other])
        for a in range(units):
            for u in range(units):
                table[a, u] += sum(float(kappa[a, b] * matrices[other][b, u]) for b in range(units))
    return table


def soft_couplings(count: int, units: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    plans = torch.rand(count - 1, units, units, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    for _ in range(200):
        plans = plans / plans.sum(1, keepdim=True)
        plans = plans / plans.sum(2, keepdim=True)
    return plans


def hard_couplings(count: int, units: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(units, generator=generator) for _ in range(count - 1)])


def matrices_of(couplings: Sequence[Tensor] | Tensor, units: int) -> list[Tensor]:
    """All networks' couplings as matrices (units, universe), the anchor's identity first."""
    found = [torch.eye(units, dtype=torch.float64)]
    for coupling in couplings:
        if coupling.dtype == torch.int64:
            matrix = torch.zeros(units, units, dtype=torch.float64)
            for u, a in enumerate(coupling.tolist()):
                matrix[a, u] = 1
            coupling = matrix
        found.append(coupling)
    return found


def mixed_couplings(count: int, units: int, seed: int) -> list[Tensor]:
    soft, hard = soft_couplings(count, units, seed), hard_couplings(count, units, seed)
    return [soft[k] if k % 2 else hard[k] for k in range(count - 1)]


by_couplings = pytest.mark.parametrize("couplings_of", [soft_couplings, hard_couplings, mixed_couplings])


@by_kernel
@by_couplings
@pytest.mark.parametrize("count", [2, 3, 4])
def test_scores_are_the_sum_over_all_other_networks(kernel, pair, error, couplings_of, count):
    rows, couplings = normal(count, 5, 3, seed=count), couplings_of(count, 5, seed=count)
    pool = kernel.pool(rows, couplings)
    for k in range(1, count):
        assert relative(pool.scores(k), naive_scores(pair, rows, matrices_of(couplings, 5), k)) <= 10 * error


@by_kernel
@by_couplings
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_pool_follows_its_replacements(kernel, pair, error, couplings_of, count):
    rows, couplings = normal(count, 5, 3, seed=count), list(couplings_of(count, 5, seed=count))
    pool = kernel.pool(rows, list(couplings))
    for step in range(2 * count):
        k = 1 + step % (count - 1)
        couplings[k - 1] = couplings_of(4, 5, seed=100 + step)[step % 3]
        pool.replace(k, couplings[k - 1])
        for other in range(1, count):
            expected = naive_scores(pair, rows, matrices_of(couplings, 5), other)
            assert relative(pool.scores(other), expected) <= 10 * error


@by_kernel
def test_a_network_is_not_scored_against_itself(kernel, pair, error):
    rows = normal(3, 5, 3)
    first, second = hard_couplings(3, 5, seed=0), hard_couplings(3, 5, seed=1)
    second[1] = first[1]
    assert relative(kernel.pool(rows, first).scores(1), kernel.pool(rows, second).scores(1)) <= 1e-12
    assert relative(kernel.pool(rows, first).scores(2), kernel.pool(rows, second).scores(2)) > 1e-3


@by_kernel
@by_couplings
def test_pooling_changes_neither_rows_nor_couplings(kernel, pair, error, couplings_of):
    rows, couplings = normal(3, 5, 3), list(couplings_of(3, 5, seed=0))
    before = rows.clone(), [coupling.clone() for coupling in couplings]
    pool = kernel.pool(rows, couplings)
    pool.scores(1)
    pool.replace(1, torch.arange(5))
    pool.scores(2)
    assert torch.equal(rows, before[0])
    assert all(torch.equal(now, then) for now, then in zip(couplings, before[1], strict=True))


def test_the_inner_product_compares_with_the_sum_of_the_others():
    count = 6
    rows, couplings = normal(count, 5, 3), hard_couplings(count, 5, seed=0)
    sums = rows[0] + sum(rows[k][couplings[k - 1]] for k in range(1, count))
    expected = rows[2] @ (sums - rows[2][couplings[1]]).T
    torch.testing.assert_close(InnerProduct().pool(rows, couplings).scores(2), expected)
