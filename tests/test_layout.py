"""Memory layouts: pictures go through networks channels last, but for networks that cannot take it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weldnet
from weldnet._modules import fast_layout
from weldnet.evaluation import evaluate
from weldnet.training import Recipe, distil, fine_tune

IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 4


class Network(nn.Module):
    """A convolution and a linear layer, with the values between them flattened in one of several ways."""

    def __init__(self, flatten: str):
        super().__init__()
        self.conv, self.fc, self.flatten = nn.Conv2d(3, 6, 3), nn.Linear(6 * 16, 4), flatten
        self.layouts: set[bool] = set()

    def forward(self, x):
        self.layouts.add(x.is_contiguous(memory_format=torch.channels_last))
        assert len(x) != 2 or self.flatten != "no two"
        x = self.conv(x).relu()
        if self.flatten == "view":
            x = x.view(len(x), -1)
        elif self.flatten == "view of channels":
            x = x.view(6 * len(x), 16).sub(1).view(len(x), -1)
        return self.fc(x.flatten(1))


def make(flatten: str, seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(flatten).eval()


def test_pictures_go_channels_last_where_all_networks_take_it():
    viewing, plain = make("view", 0), make("flatten", 0).train()
    assert fast_layout([plain], IMAGES) == torch.channels_last
    assert fast_layout([plain, viewing], IMAGES) == torch.contiguous_format
    assert fast_layout([make("view of channels", 0)], IMAGES) == torch.contiguous_format
    assert fast_layout([make("no two", 0)], IMAGES) == torch.contiguous_format
    assert fast_layout([plain], IMAGES[:, 0]) == torch.contiguous_format
    assert plain.training


def test_evaluation_uses_the_faster_layout():
    network = make("flatten", 0)
    evaluate(network, (IMAGES, LABELS))
    assert network.layouts == {True}


@pytest.mark.parametrize("flatten", ["view", "view of channels", "no two", "flatten"])
def test_networks_that_view_are_trained_distilled_measured_and_repaired(flatten):
    a, b = make(flatten, 0), make(flatten, 1)
    recipe = Recipe(epochs=1, batch_size=8)
    tuned = fine_tune(a, (IMAGES, LABELS), recipe, progress=False)
    assert not torch.equal(tuned.model.fc.weight, a.fc.weight)
    assert tuned.model.conv.weight.is_contiguous()
    distil(a, [a, b], IMAGES, recipe, progress=False)
    for repair in ("data", "refit"):
        fused = weldnet.fuse([a, b], IMAGES[:1], method="activation_matching", repair=repair, data=IMAGES)
        assert evaluate(fused.model, (IMAGES, LABELS)).samples == len(IMAGES)


def test_a_student_that_takes_the_layout_learns_from_a_parent_that_does_not():
    student, parents = make("flatten", 0), [make("view", 1), make("flatten", 2)]
    found = distil(student, parents, IMAGES, Recipe(epochs=1, batch_size=8), progress=False)
    assert not torch.equal(found.model.fc.weight, student.fc.weight)
