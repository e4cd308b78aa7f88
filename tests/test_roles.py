"""Roles: whether a tensor writes the units on an axis or sums over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from test_laws import NETWORKS
from weldnet.structure import Structure, capture


def reading(structure: Structure) -> set[tuple[str, int]]:
    return {(p.tensor, p.axes[-1]) for p in structure.places if p.role == "reads"}


#: By network: every tensor that sums over units, and the axis (of its view) on which they lie.
READS = {
    "mlp": {("2.weight", 1), ("4.weight", 1)},
    "residual": {("one.weight", 1), ("two.weight", 1), ("head.weight", 1)},
    "grouped": {("3.weight", 2), ("7.weight", 1)},
    "split": {("mix.weight", 1), ("gate.weight", 1), ("head.weight", 1)},
    "depthwise": {("5.weight", 1), ("9.weight", 1)},
    "tied": {("up.weight", 1), ("down.weight", 1)},
    "recurrent": {("keep.weight", 1), ("head.weight", 1)},
    "attention": {
        ("attention.in_proj_weight", 1),
        ("attention.out_proj.weight", 1),
        ("up.weight", 1),
        ("down.weight", 1),
        ("head.weight", 1),
    },
    "deep": {("3.weight", 2), ("7.weight", 1)},
    "normalised": {("turn.weight", 1), ("head.weight", 1)},
}


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_inputs_of_layers_are_read_and_all_else_is_written(network):
    assert reading(network.structure) == READS[network.name]
    both = {p.tensor for p in network.structure.places if p.role == "both"}
    assert both == ({"embed.weight"} if network.name == "tied" else set())


def test_transposed_weights_and_vectors_are_read_where_they_sum():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 6)), nn.ConvTranspose2d(6, 5, 2)
            self.vector = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(torch.relu(x @ self.up)[:, :, None, None]).mean((2, 3))
            return torch.relu(x) @ self.vector

    structure = capture(Net(), torch.randn(3, 4))
    assert reading(structure) == {("down.weight", 0), ("vector", 0)}


def test_weights_made_from_other_tensors_are_read_through_them():
    layers = [weight_norm(nn.Linear(4, 6)), nn.ReLU(), weight_norm(nn.Linear(6, 3))]
    structure = capture(nn.Sequential(*layers), torch.randn(2, 4))
    assert reading(structure) == {("2.parametrizations.weight.original1", 1)}
    assert structure.completeness()["free"] == 1.0


def test_roles_survive_json():
    structure = NETWORKS[5].structure
    again = Structure.from_json(structure.to_json())
    assert [p.role for p in again.places] == [p.role for p in structure.places]
    assert {p.role for p in again.places} == {"reads", "writes", "both"}
