"""What goes to a device and back: every tensor once, and no more than what the CPU has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

import weldnet
from accelerator import Accelerator, Copy
from device_cases import DATA, FEW, LABELS, X, conv
from weldnet.evaluation import evaluate_together


def numbers(copies: Sequence[Copy]) -> Counter[tuple[int, ...]]:
    """How often tensors of each shape went over; positions and truth values do not count."""
    return Counter(copied.shape for copied in copies if not copied.is_index)


def shapes(networks: Sequence[nn.Module]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(t.shape) for n in networks for t in n.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("method", ["weight_matching", "gamf", "frank_wolfe", "optimal_transport"])
def test_an_alignment_sends_each_tensor_once_and_fetches_what_is_assigned(method):
    networks = [conv(seed) for seed in range(3)]
    structure = weldnet.capture(networks[0], X)
    with Accelerator() as device:
        weldnet.align(networks, structure, method=method, device="lazy", **FEW.get(method, {}))
    placed = {place.tensor for place in structure.places}
    states = [{name: t for name, t in n.state_dict().items() if name in placed} for n in networks]
    assert numbers(device.sent) == Counter(tuple(t.shape) for state in states for t in state.values())
    scores = {(space.size, space.size) for space in structure.spaces}
    line = {(2, 2), (3, 3)} if method == "frank_wolfe" else set()  # the coefficients of its line search
    assert set(numbers(device.fetched)) <= scores | line


def test_an_assignment_is_fetched_once():
    """Of two networks: one table of scores for each space and sweep, the first pass over the spaces included."""
    networks = [conv(seed) for seed in range(2)]
    structure = weldnet.capture(networks[0], X)
    with Accelerator() as device:
        found = weldnet.align(networks, structure, method="weight_matching", device="lazy")
    assert sum(numbers(device.fetched).values()) <= (1 + found.stats["sweeps"]) * len(structure.spaces)


@pytest.mark.parametrize("method", ["straight_through", "sinkhorn_rebasin"])
def test_a_method_that_learns_from_batches_sends_each_once(method):
    """Not in every epoch."""
    networks = [conv(seed) for seed in range(2)]
    structure = weldnet.capture(networks[0], X)
    options: dict[str, Any] = {"epochs": 3, "samples": 32, "batch_size": 16}
    if method == "sinkhorn_rebasin":
        options |= {"loss": "midpoint", "steps": 2}
    with Accelerator() as device:
        weldnet.align(networks, structure, method=method, data=DATA, device="lazy", **options)
    assert numbers(device.sent)[16, 3, 8, 8] == 2


def test_a_fusion_sends_networks_and_inputs_once_a_step():
    networks = [conv(seed) for seed in range(2)]
    options: dict[str, Any] = {"method": "weight_matching", "check": False, "progress": False}
    with Accelerator() as device:
        fused = weldnet.fuse(networks, X, data=DATA, repair="refit", device="lazy", **options)
    sent = numbers(device.sent)
    inputs = sent.pop(tuple(DATA.shape))
    assert sent == shapes(networks)
    assert inputs <= 3  # for the repair, and for each of two measurements
    assert numbers(device.fetched) >= shapes([fused.model])


def test_a_barrier_sends_both_networks_once():
    networks = [conv(seed) for seed in range(2)]
    with Accelerator() as device:
        weldnet.barrier(*networks, evaluate=(DATA, LABELS), points=5, device="lazy")
    sent = numbers(device.sent)
    assert sent.pop(tuple(DATA.shape)) == 5
    assert sent == shapes(networks) + Counter({(2, *X.shape[1:]): 5})
    assert numbers(device.fetched) == Counter({(len(DATA), 4): 5})  # the logits


def test_networks_on_one_device_share_the_batches():
    networks = [conv(seed) for seed in range(3)]
    with Accelerator() as device:
        evaluate_together(networks, (DATA, LABELS), batch_size=8, device="lazy")
    assert numbers(device.sent)[8, 3, 8, 8] == 4
    assert numbers(device.fetched) == Counter({(len(DATA), 4): 3})
