"""What is asked to be on a device is there: no tensor stays behind, the work is done there, results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weldnet
from accelerator import Accelerator, Far, MixedDevicesError
from networks import NETWORKS
from weldnet.alignment import METHODS, Gamf, OptimalTransport, make_method
from weldnet.checkpoints import save

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FEW: dict[str, dict[str, Any]] = {"gamf": {"gamma": 0.3}, "frank_wolfe": {"steps": 3}, "sinkhorn_rebasin": {"steps": 3}}
#: Without the methods that run networks on data: these go where their networks are.
CHOSEN = [
    *(make_method(n, **FEW.get(n, {})) for n in METHODS if not make_method(n).needs_data and n != "identity"),
    *(Gamf(sigma=4.0, gamma=0.3), Gamf(affinity="vector", gamma=0.3), OptimalTransport(plan="entropic")),
]


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()


def test_the_device_refuses_what_a_real_one_does():
    with Accelerator() as device:
        there = torch.ones(2, 2).to("lazy")
        assert isinstance(there, Far)
        assert there.device.type == "lazy"
        assert float((there @ there).sum()) == 8
        with pytest.raises(MixedDevicesError, match="CPU"):
            there + torch.ones(2)
    assert (device.here, device.there) == (0, 1)


@pytest.mark.parametrize("method", CHOSEN, ids=repr)
@pytest.mark.parametrize("case", ["conv", "attention"])
def test_alignment_is_done_on_the_device(case, method):
    networks, x = [conv(seed) for seed in range(3)], X
    if case == "attention":
        networks, x = [NETWORKS[case].model(seed) for seed in range(2)], NETWORKS[case].example()
    structure = weldnet.capture(networks[0], x)
    here = weldnet.align(networks, structure, method=method)
    with Accelerator() as device:
        there = weldnet.align(networks, structure, method=method, device="lazy")
    assert device.there > 0
    assert device.here == 0
    for name, couplings in here.couplings.items():
        for space, coupling in couplings.items():
            assert torch.equal(coupling.matrix(), there[name][space].matrix()), (name, space)


def test_fusing_and_streaming_align_on_the_device(tmp_path):
    networks = {f"n{seed}": conv(seed) for seed in range(2)}
    files: dict[str, Path] = {}
    for name, network in networks.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save(network.state_dict(), files[name])
    options: dict[str, Any] = {"method": "weight_matching", "check": False, "progress": False}
    here = weldnet.fuse(networks, X, repair="none", **options).state_dict()
    with Accelerator() as device:
        there = weldnet.fuse(networks, X, repair="none", device="lazy", **options).state_dict()
    with Accelerator() as streaming:
        stream = weldnet.fuse_files(files, X, model=conv, out=tmp_path / "out", device="lazy", **options)
    assert device.there > 0
    assert streaming.there > 0
    for key, tensor in weldnet.load(stream.path).items():
        assert torch.equal(tensor, here[key]), key
        assert torch.equal(there[key], here[key]), key


def test_scores_are_computed_on_the_device():
    net, labels = conv(0), torch.zeros(8, dtype=torch.int64)
    data = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), labels)
    here = weldnet.evaluate(net, data)
    with Accelerator() as device:
        there = weldnet.evaluate(net, data, device="lazy")
        curve = weldnet.barrier(net, conv(1), evaluate=data, points=3, device="lazy")
    assert device.here == 0
    assert device.there > 0
    assert there == here
    assert curve == weldnet.barrier(net, conv(1), evaluate=data, points=3)
    assert all(not isinstance(tensor, Far) for tensor in net.state_dict().values())
