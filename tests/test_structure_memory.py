"""What capture cannot see past: values that leave torch, and tensors that share memory under different names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weldnet
from networks import Net
from weldnet.errors import CaptureError
from weldnet.structure import Structure, capture

X = torch.linspace(-1, 1, 10).reshape(2, 5)


# -- values that leave torch -----------------------------------------------------------------------


def leaving(step: Callable[[Net, Tensor], Tensor]) -> Net:
    """A network whose hidden units pass through ``step``."""
    return Net(lambda m, x: m.b(step(m, m.a(x).relu())), a=nn.Linear(5, 6), b=nn.Linear(6, 3))


def hidden_failure(m: Net, h: Tensor) -> Tensor:
    try:
        return h * float(m.a.weight.detach().numpy()[0, 0])
    except RuntimeError:
        return h


LEAVING = {
    "a number of a weight": lambda m, h: h * float(m.a.weight.detach().numpy()[0, 0]),
    "a number of activations": lambda m, h: h * float(h.detach().numpy()[0, 0]),
    "an index": lambda m, h: h.roll(int(m.a.weight.detach().numpy()[:, 0].argmax()), 1),
    "an array": lambda m, h: h + torch.from_numpy(m.a.bias.detach().numpy() * 2),
    "asarray": lambda m, h: h * float(np.asarray(m.a.weight.detach())[0, 0]),
    "dlpack": lambda m, h: h * float(np.from_dlpack(m.a.weight.detach())[0, 0]),
    "tolist": lambda m, h: h * m.a.weight.tolist()[0][0],
    "an address": lambda m, h: h if m.a.weight.data_ptr() else 2 * h,
    "a failure that the model hides": hidden_failure,
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_value_that_depends_on_weights_and_leaves_torch_is_refused(name: str):
    with pytest.raises(CaptureError, match=r"Net cannot be traced.*takes values that depend on weights.*plain tensor"):
        capture(leaving(LEAVING[name]), X)


def test_values_that_no_weight_decides_may_leave_torch():
    """They must be the real ones: here a table of indices, made as an array, turns the units around."""

    def turned(m: Net, h: Tensor) -> Tensor:
        table = torch.arange(6).numpy()[::-1].tolist()
        return h[:, table] * float(torch.full((2,), 3.0).numpy().sum())

    model = leaving(turned)
    structure = capture(model, X)
    assert [space.size for space in structure.spaces] == [6]
    assert weldnet.check(model, X, structure).error <= 1e-9
    read = {place.tensor: structure.positions(place).ravel().tolist() for place in structure.places}
    assert read["b.weight"] == read["a.weight"][::-1]


# -- tensors that share memory ---------------------------------------------------------------------


def sharing(share: Callable[[Net], None], *, device: str = "cpu") -> Net:
    """Three layers, of which ``share`` puts tensors of some into the memory of others."""
    with torch.device(device):
        model = Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu() * m.scale),
            a=nn.Linear(5, 5),
            b=nn.Linear(5, 5),
            c=nn.Linear(5, 3),
        )
        model.scale = 1.0
    share(model)
    return model


def weights_as_one_parameter(m: Net) -> None:
    m.b.weight = m.a.weight


def weights(m: Net) -> None:
    m.b.weight = nn.Parameter(m.a.weight.data)


def biases(m: Net) -> None:
    m.b.bias = nn.Parameter(m.a.bias.data)


def a_buffer(m: Net) -> None:
    del m.scale
    m.register_buffer("scale", m.a.bias.data)


def a_part(m: Net) -> None:
    m.b.bias = nn.Parameter(m.a.weight.data[0])


def transposed(m: Net) -> None:
    m.b.weight = nn.Parameter(m.a.weight.data.t())


def a_hidden_buffer(m: Net) -> None:
    del m.scale
    m.register_buffer("scale", m.a.bias.data[:5], persistent=False)


def an_attribute(m: Net) -> None:
    m.scale = m.a.bias.data[:5]


def beside_each_other(m: Net) -> None:
    whole = torch.linspace(-1, 1, 55, device=m.a.weight.device)
    m.a.weight, m.b.weight = nn.Parameter(whole[:25].view(5, 5)), nn.Parameter(whole[25:50].view(5, 5))
    m.scale = whole[50:]


def interleaved(m: Net) -> None:
    whole = torch.linspace(-1, 1, 50, device=m.a.weight.device).view(5, 10)
    m.a.weight, m.b.weight = nn.Parameter(whole[:, :5]), nn.Parameter(whole[:, 5:])


everywhere = pytest.mark.parametrize("device", ["cpu", "meta"])
both_routes = pytest.mark.parametrize("route", ["dispatch", "export"])


def captured(share: Callable[[Net], None], device: str, route: str) -> Structure:
    return capture(sharing(share, device=device), X, route=route)


@everywhere
@both_routes
@pytest.mark.parametrize("share", [weights, biases, a_buffer])
def test_two_names_of_the_same_memory_are_one_tensor(share: Callable[[Net], None], device: str, route: str):
    structure = captured(share, device, route)
    assert len(structure.aliases) == 1
    if device == "cpu":
        model = sharing(share)
        assert weldnet.check(model, X, structure).error <= 1e-9
        assert weldnet.power(model, X, structure).error <= 1e-9


@both_routes
def test_shared_memory_is_as_good_as_one_parameter(route: str):
    assert captured(weights, "cpu", route) == captured(weights_as_one_parameter, "cpu", route)


@everywhere
@both_routes
@pytest.mark.parametrize("share", [a_part, transposed])
def test_weights_that_share_a_part_are_refused(share: Callable[[Net], None], device: str, route: str):
    with pytest.raises(CaptureError, match=r"'a.weight' \[5, 5\] and 'b\.\w+' .* share a part of their memory.*clone"):
        captured(share, device, route)


@everywhere
@pytest.mark.parametrize("route", ["dispatch", "export", "auto"])
@pytest.mark.parametrize("share", [a_hidden_buffer, an_attribute])
def test_a_weight_read_through_another_tensor_is_refused(share: Callable[[Net], None], device: str, route: str):
    with pytest.raises(CaptureError, match=r"shares the memory of 'a.bias'|outside of torch"):
        captured(share, device, route)


@everywhere
@both_routes
@pytest.mark.parametrize("share", [beside_each_other, interleaved])
def test_one_memory_for_weights_that_do_not_overlap_is_fine(share: Callable[[Net], None], device: str, route: str):
    structure = captured(share, device, route)
    assert dict(structure.aliases) == {}
    assert 5 in [space.size for space in structure.spaces]


def test_capture_leaves_shared_memory_as_it_is():
    model = sharing(weights)
    before = model.a.weight.data_ptr()
    capture(model, X)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr() == before
    assert model.a.weight is not model.b.weight
