"""Clusters: what is equal comes together, and the groups are good ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from weldnet.assignment import cluster


def spread(rows, labels, masses):
    total = 0.0
    for group in labels.unique():
        inside = labels == group
        mean = (rows[inside] * masses[inside, None]).sum(0) / masses[inside].sum()
        total += float(((rows[inside] - mean).square().sum(1) * masses[inside]).sum())
    return total


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_come_together_and_different_ones_do_not(seed):
    g = torch.Generator().manual_seed(seed)
    distinct = torch.randn(6, 4, generator=g, dtype=torch.float64)
    which = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 3, 5, 5, 5])
    for count in (6, 9):
        labels = cluster(distinct[which], count, torch.rand(12, generator=g) + 0.1, g)
        assert torch.equal(labels[:, None] == labels[None, :], which[:, None] == which[None, :])
        assert int(labels.max()) < count


def test_small_problems_are_solved_exactly():
    g = torch.Generator().manual_seed(1)
    rows, masses = torch.randn(7, 2, generator=g, dtype=torch.float64), torch.rand(7, generator=g).double() + 0.1
    best = min(spread(rows, torch.tensor(each), masses) for each in itertools.product(range(3), repeat=7))
    assert spread(rows, cluster(rows, 3, masses, g, starts=20), masses) == pytest.approx(best, rel=1e-9)


def test_heavy_rows_decide():
    rows = torch.tensor([[0.0], [1.0], [2.2]])
    generator = torch.Generator().manual_seed(0)
    light = cluster(rows, 2, torch.tensor([1.0, 1.0, 1.0]), generator)
    heavy = cluster(rows, 2, torch.tensor([100.0, 100.0, 1.0]), generator)
    assert light[0] == light[1] != light[2]
    assert heavy[1] == heavy[2] != heavy[0]


def test_the_same_seed_gives_the_same_groups():
    rows = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    one, other = (cluster(rows, 5, torch.ones(30), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
