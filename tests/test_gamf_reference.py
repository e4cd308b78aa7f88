"""GAMF against a slow implementation of the published formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference_gamf as reference
from weldnet.affinity import Gaussian
from weldnet.alignment import Gamf, Problem
from weldnet.alignment import _ascent as ascent_file
from weldnet.structure import Structure, capture, renumber

WIDTHS = (5, 7, 6, 7, 4)
SIGMA = 1.3  # in units of the weights' mean square


def chain_model(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def structure_of(widths: tuple[int, ...]) -> Structure:
    return capture(chain_model(widths), torch.zeros(2, widths[0]))


def states_of(count: int, widths: tuple[int, ...], mean_square: float, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random networks in which every tensor, over all networks, has one mean square: then one sigma fits all."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, tensor in chain_model(widths).state_dict().items():
        stack = torch.randn(count, *tensor.shape, generator=generator, dtype=torch.float64)
        tensors[name] = stack * (mean_square / stack.square().mean()).sqrt()
    return {f"n{k}": {name: stack[k] for name, stack in tensors.items()} for k in range(count)}


def chain_of(state: dict[str, Tensor]) -> list[np.ndarray]:
    return [tensor.double().T.numpy() for tensor in state.values()]


def soft_plans(count: int, units: int, generator: torch.Generator) -> Tensor:
    plans = torch.rand(count, units, units, generator=generator, dtype=torch.float64) ** 4 + 1e-4
    for _ in range(500):
        plans = plans / plans.sum(1, keepdim=True)
        plans = plans / plans.sum(2, keepdim=True)
    return plans


def ascent_with_soft_couplings(structure: Structure, states: dict[str, dict[str, Tensor]], seed: int):
    """An annealing in mid-flight, and its couplings [network][space] for the reference, the anchor's included."""
    ascent = ascent_file.start(Problem(structure, states), "entry")
    generator = torch.Generator().manual_seed(seed)
    couplings: list[list[np.ndarray]] = [[np.eye(s.size) for s in structure.spaces]] + [[] for _ in ascent.moving]
    for space in structure.spaces:
        plans = soft_plans(len(ascent.moving), space.size, generator)
        ascent.couplings[space.name] = plans.float()
        for k in ascent.moving:
            couplings[k].append(plans[k - 1].numpy())
    return ascent, couplings


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("mean_square", [1.0, 0.04])
def test_one_visit_of_two_networks_has_the_published_affinities(mean_square):
    structure, states = structure_of(WIDTHS), states_of(2, WIDTHS, mean_square)
    ascent, couplings = ascent_with_soft_couplings(structure, states, seed=1)
    anchor, moving = chain_of(states["n0"]), chain_of(states["n1"])
    assert [s.size for s in structure.spaces] == list(WIDTHS[1:-1])
    for i, space in enumerate(structure.spaces):
        expected = reference.pair_affinity(moving, anchor, i, couplings[1], couplings[0], SIGMA * mean_square)
        got = ascent.pool(space, Gaussian(SIGMA, tolerance=0)).scores(1).numpy()
        assert relative(got, expected) <= 1e-5


def test_the_fast_expansion_has_the_published_affinities_too():
    structure, states = structure_of(WIDTHS), states_of(2, WIDTHS, 1.0)
    ascent, couplings = ascent_with_soft_couplings(structure, states, seed=1)
    chains = [chain_of(state) for state in states.values()]
    for i, space in enumerate(structure.spaces):
        expected = reference.universe_affinity(chains, 1, i, couplings, 12.0)
        got = ascent.pool(space, Gaussian(12.0, tolerance=1e-5)).scores(1).numpy()
        assert relative(got, expected) <= 2e-5


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_visit_of_many_networks_sums_over_all_others(count):
    widths = (4, 5, 6, 3)
    structure, states = structure_of(widths), states_of(count, widths, 1.0)
    ascent, couplings = ascent_with_soft_couplings(structure, states, seed=2)
    chains = [chain_of(state) for state in states.values()]
    for i, space in enumerate(structure.spaces):
        pool = ascent.pool(space, Gaussian(SIGMA, tolerance=0))
        for k in ascent.moving:
            expected = reference.universe_affinity(chains, k, i, couplings, SIGMA)
            assert relative(pool.scores(k).numpy(), expected) <= 1e-5


def test_the_reference_tells_wrong_directions_apart():
    """Were a coupling used the wrong way round, or a side forgotten, the comparison above would see it."""
    structure, states = structure_of(WIDTHS), states_of(2, WIDTHS, 1.0)
    _, couplings = ascent_with_soft_couplings(structure, states, seed=1)
    anchor, moving = chain_of(states["n0"]), chain_of(states["n1"])
    right = reference.pair_affinity(moving, anchor, 1, couplings[1], couplings[0], SIGMA)
    turned = reference.pair_affinity(moving, anchor, 1, [c.T for c in couplings[1]], couplings[0], SIGMA)
    other = reference.pair_affinity(anchor, moving, 1, couplings[0], couplings[1], SIGMA)
    assert relative(turned, right) > 1e-2
    assert relative(other, right) > 1e-2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_both_recover_a_planted_permutation(seed, noise):
    widths = (5, 8, 8, 4)
    structure = structure_of(widths)
    original = states_of(1, widths, 1.0, seed)["n0"]
    generator = torch.Generator().manual_seed(seed)
    planted = {s.name: torch.randperm(s.size, generator=generator) for s in structure.spaces}
    moved = renumber(original, structure, planted)
    moved = {n: t + noise * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in moved.items()}

    found = Gamf(sigma=SIGMA, tolerance=0)(Problem(structure, {"a": original, "b": moved}))["b"]
    plans = reference.align_two(chain_of(moved), chain_of(original), SIGMA)
    for space, plan in zip(structure.spaces, plans, strict=True):
        expected = torch.argsort(planted[space.name])
        assert torch.equal(found[space.name].source, expected)
        assert plan.argmax(0).tolist() == expected.tolist()
