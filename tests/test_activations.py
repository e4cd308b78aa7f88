"""Activations: layers are found by structure, and their channels go where the units go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weldnet.activations import Observer, carry_channels, find_layers, held, observed, run, unlabelled_batches
from weldnet.alignment import transport
from weldnet.assignment import Permutation, Plan
from weldnet.errors import DataError
from weldnet.structure import capture, random_renumbering

LAYERED = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)), (5, 4), 2),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(),
            nn.Linear(6 * 4, 5), nn.ReLU(), nn.Linear(5, 2),
        ),
        (2, 3, 6, 6),
        4,
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)), (2, 3, 5, 5), 1),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(3, 6, 2), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), (2, 3, 5), 2),
    "transformer": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 2)),
        (2, 4, 3),
        4,
    ),
}  # fmt: skip


def state_loaded(model, state):
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", LAYERED)
def test_channels_go_where_the_units_go(name):
    """A renumbered network shows the same activations, renumbered: at every layer that holds units."""
    build, shape, moving = LAYERED[name]
    torch.manual_seed(0)
    model = build().eval().double()
    x = torch.randn(shape, dtype=torch.float64)
    structure = capture(model, x)
    sources = random_renumbering(structure, torch.Generator().manual_seed(1))
    couplings = {space: Permutation(source) for space, source in sources.items()}
    moved = state_loaded(build().eval().double(), transport(model.state_dict(), structure, couplings))
    layers = {layer.name: layer for layer in find_layers(model, structure)}
    seen = next(Observer({"a": model, "b": moved}, {"a": structure, "b": structure}).batches(x, samples=9))
    assert sum(bool(layer.places) for layer in layers.values()) >= moving
    for layer, rows in seen["a"].items():
        carried = carry_channels(rows, layers[layer].places, structure, couplings)
        torch.testing.assert_close(carried, seen["b"][layer], msg=layer)


def test_the_inputs_of_layers_have_places_too():
    build, shape, _ = LAYERED["cnn"]
    model = build().eval()
    structure = capture(model, torch.zeros(shape))
    layers = {layer.name: layer for layer in find_layers(model, structure)}
    assert [p.space for p in layers["3"].in_places] == [p.space for p in layers["1"].places]
    assert [structure.positions(p).shape for p in layers["5"].in_places] == [(6, 4)]
    assert layers["0"].in_places == ()


def test_soft_couplings_give_means_of_channels():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    structure = capture(model, torch.zeros(1, 2))
    layer = find_layers(model, structure)[0]
    plan = Plan(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    rows = carry_channels(torch.tensor([[4.0, 8.0]]), layer.places, structure, {structure.spaces[0].name: plan})
    torch.testing.assert_close(rows, torch.tensor([[5.0, 7.0]]))


def test_looking_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).train()
    structure = capture(model, torch.zeros(2, 2))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    list(Observer({"a": model}, {"a": structure}).batches(torch.randn(8, 2), samples=8, batch_size=4))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_what_a_visit_returns_takes_the_place_of_the_output():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    layers = find_layers(model, capture(model, torch.zeros(1, 2)))
    with observed(model, layers[:1], lambda layer, given, out: torch.zeros_like(out)):
        torch.testing.assert_close(run(model, torch.ones(1, 2)), model[2].bias.detach()[None])


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(DataError, match=r"shape \(1, 3\) do not fit Sequential"):
        run(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 3))


def test_iterators_can_be_read_again():
    data = held(iter([torch.zeros(2, 3), torch.ones(2, 3)]), samples=3)
    assert [len(b) for _ in range(2) for b in unlabelled_batches(data, samples=9)] == [2, 1, 2, 1]
    same = torch.zeros(2, 3)
    assert held(same) is same
