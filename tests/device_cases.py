"""A small network, its data, and what the tests of devices ask of networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FEW: dict[str, dict[str, Any]] = {"gamf": {"gamma": 0.3}, "frank_wolfe": {"steps": 3}, "sinkhorn_rebasin": {"steps": 3}}
DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 4


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()


def far(networks: list[nn.Module]) -> list[nn.Module]:
    """Copies on the device; it must be active."""
    return [copy.deepcopy(network).to("lazy") for network in networks]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key].cpu(), second[key].cpu()) for key in first)
