"""Alignments judged space by space."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import weldnet
from test_laws import MLP, NETWORKS, random_couplings
from test_soft_couplings import as_plans, soft_couplings
from weldnet.alignment import Alignment, diagnose, transport
from weldnet.assignment import Permutation
from weldnet.errors import AlignmentError


def still(structure):
    return {space.name: Permutation.identity(space.size) for space in structure.spaces}


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_network_and_its_renumbering_match_wholly_once_they_are_aligned(network):
    structure, state, couplings = network.structure, network.state(1), random_couplings(network.structure, 3)
    other = transport(state, structure, {name: c.inverse() for name, c in couplings.items()})
    alignment = Alignment({"a": still(structure), "b": couplings})
    for row in diagnose(alignment, [state, other], structure).rows:
        assert row.quality == pytest.approx(1)
        assert row.cost == pytest.approx(0, abs=1e-9)
        assert row.moved == couplings[row.space].moved
        assert row.unaligned < 1 or row.moved == 0
        assert row.units == structure.space(row.space).size


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_plans_that_are_permutations_are_judged_like_permutations(network):
    structure, hard = network.structure, random_couplings(network.structure, 3)
    states = [network.state(1), network.state(2)]
    first, second = (
        diagnose(Alignment({"a": still(structure), "b": couplings}), states, structure)
        for couplings in (hard, as_plans(structure, hard))
    )
    for one, other in zip(first.to_dict(), second.to_dict(), strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_soft_plans_are_judged(network):
    structure = network.structure
    alignment = Alignment({"a": still(structure), "b": soft_couplings(structure)})
    for row in diagnose(alignment, [network.state(1), network.state(2)], structure).rows:
        assert -1 <= row.quality < 0.999
        assert 0 < row.moved < 1
        assert row.cost > 0


def test_quality_and_cost_are_the_hand_computed_ones():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    structure = weldnet.capture(model, torch.zeros(1, 1))
    a = {"0.weight": torch.tensor([[1.0], [1.0]]), "2.weight": torch.tensor([[1.0, -1.0]])}
    b = {"0.weight": torch.tensor([[1.0], [1.0]]), "2.weight": torch.tensor([[-1.0, 1.0]])}
    swap = Alignment({"a": still(structure), "b": {"0": Permutation(torch.tensor([1, 0]))}})
    (row,) = diagnose(swap, [a, b], structure).rows
    assert (row.units, row.moved, row.quality, row.unaligned, row.cost) == pytest.approx((2, 1, 1, 0, 0))
    as_is = Alignment({"a": still(structure), "b": still(structure)})
    (row,) = diagnose(as_is, [a, b], structure).rows
    # Rows (1, 1), (1, -1) against (1, -1), (1, 1): at right angles, square distance 4 of 2 + 2.
    assert (row.moved, row.quality, row.unaligned, row.cost) == pytest.approx((0, 0, 0, 1))


def test_scaling_a_tensor_of_all_networks_changes_nothing():
    structure = MLP.structure
    states = [MLP.state(1), MLP.state(2), MLP.state(3)]
    scaled = [{n: t * (100 if n == next(iter(s)) else 1) for n, t in s.items()} for s in states]
    alignment = Alignment(dict.fromkeys("abc", still(structure)))
    first, second = diagnose(alignment, states, structure), diagnose(alignment, scaled, structure)
    assert [r.quality for r in first.rows] == pytest.approx([r.quality for r in second.rows])
    assert [r.cost for r in first.rows] == pytest.approx([r.cost for r in second.rows])


def test_aligning_raises_the_quality():
    states = MLP.state(1), MLP.state(2)
    alignment = weldnet.align(states, MLP.structure)
    found = diagnose(alignment, states, MLP.structure)
    moved = {n: transport(s, MLP.structure, alignment[n]) for n, s in zip("ab", states, strict=True)}
    after = diagnose(Alignment(dict.fromkeys("ab", still(MLP.structure))), moved, MLP.structure)
    assert [row.unaligned for row in after.rows] == pytest.approx([row.quality for row in found.rows])
    assert all(row.quality > row.unaligned for row in found.rows)
    assert "match quality" in str(found)
    assert "units moved: a 0.0%, b " in str(alignment)
    json.dumps(found.to_dict())


def test_dead_units_have_no_direction():
    structure, state = MLP.structure, MLP.state(1)
    dead = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    alignment = Alignment(dict.fromkeys("ab", still(structure)))
    assert all(row.quality == 0 for row in diagnose(alignment, [state, dead], structure).rows)
    assert all(row.cost == 0 for row in diagnose(alignment, [dead, dead], structure).rows)


def test_networks_of_another_alignment_are_refused():
    alignment = Alignment(dict.fromkeys("ab", still(MLP.structure)))
    with pytest.raises(AlignmentError, match="a, b, the networks are x, b"):
        diagnose(alignment, {"x": MLP.state(1), "b": MLP.state(2)}, MLP.structure)


def test_the_report_has_the_table_of_its_spaces():
    nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    result = weldnet.fuse(nets, torch.zeros(1, 4), progress=False)
    expected = diagnose(result.alignment, nets, result.structure)
    assert result.report.diagnosis == expected
    assert result.report.to_dict()["diagnosis"] == expected.to_dict()


def test_networks_of_other_widths_are_judged_without_a_before():
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    large = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    result = weldnet.fuse([small, large], torch.zeros(1, 4), method="optimal_transport", progress=False)
    (row,) = result.report.diagnosis.rows
    assert (row.units, row.unaligned) == (8, None)
    assert -1 <= row.quality <= 1
    structures = {"b": weldnet.capture(large, torch.zeros(1, 4))}
    assert diagnose(result.alignment, [small, large], result.structure, structures=structures).rows == (row,)
