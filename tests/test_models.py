from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from weldnet import models
from weldnet.errors import UsageError
from weldnet.models import MODELS, build
from weldnet.training import initialise

COLOUR = [name for name in MODELS if name.startswith(("vgg", "resnet"))]
GREY = [name for name in MODELS if name not in COLOUR]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(name: str) -> torch.Tensor:
    shape = (2, 3, 32, 32) if name in COLOUR else (2, 1, 28, 28)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def small(name: str) -> nn.Module:
    return build(name) if name == "mlp" else build(name, width=0.125)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_maps_a_batch_to_finite_logits(name):
    logits = small(name)(images(name))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_decides_the_initial_weights(name):
    first, same, other = (initialise(lambda: small(name), seed).state_dict() for seed in (3, 3, 4))
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.mlp(), 784 * 400 + 400 * 200 + 200 * 100 + 100 * 10 + 400 + 200 + 100 + 10),
        (models.mlp((5, 4, 3), bias=False), 5 * 4 + 4 * 3),
        (models.lenet(), 61_706),
        (models.simple_cnn(image_size=8), 160 + 4640 + 18_496 + 64 * 4 * 10 + 10),
    ],
)
def test_small_networks_have_the_closed_form_of_parameters(model, expected):
    assert count(model) == expected


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg13", [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg16", [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]),
    ],
)
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_vgg_has_the_closed_form_of_parameters(name, units, width):
    widths = [3, *(round(unit * width) for unit in units)]
    weights = sum(9 * a * b for a, b in pairwise(widths)) + 10 * widths[-1]
    with torch.device("meta"):
        assert count(build(name, width=width, bias=False)) == weights
        assert count(build(name, width=width)) == weights + sum(widths[1:]) + 10


def test_the_literatures_vgg11_has_9_2_million_parameters():
    with torch.device("meta"):
        assert count(models.vgg11(bias=False)) == 9_222_848


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {"num_classes": 1000, "stem": "imagenet"}, 11_689_512),
        ("resnet50", {"num_classes": 1000, "stem": "imagenet"}, 25_557_032),
        ("resnet20", {}, 272_474),
    ],
)
def test_resnets_have_the_published_number_of_parameters(name, options, expected):
    with torch.device("meta"):
        assert count(build(name, **options)) == expected


def test_parameters_have_torchvisions_names():
    with torch.device("meta"):
        resnet, vgg = models.resnet50().state_dict(), models.vgg11(batch_norm=True).state_dict()
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer4.2.bn3.bias",
        "fc.bias",
    } <= {*resnet}
    assert {
        "features.0.weight",
        "features.1.num_batches_tracked",
        "features.25.weight",
        "classifier.bias",
    } <= {*vgg}


def test_the_imagenet_stem_quarters_the_image():
    model = models.resnet18(width=0.125, stem="imagenet")
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert model.maxpool(model.conv1(torch.zeros(2, 3, 64, 64))).shape[2:] == (16, 16)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_the_simple_cnn_fits_its_image_size(size):
    model = models.simple_cnn(image_size=size, in_channels=3, num_classes=7, width=0.5)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_vgg_fits_larger_images():
    assert models.vgg11(width=0.1, image_size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_a_tiny_width_keeps_one_unit_per_layer():
    assert models.resnet20(width=0.001)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_deep_network_without_norm_passes_its_signal_on():
    model = initialise(lambda: models.vgg16(width=0.25, bias=False), 0)
    features = model.features(images("vgg16"))
    assert 0.01 < features.std() < 10


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vgg12", {}, ["'vgg12'", "vgg11", "resnet50"]),
        ("lenet", {"depth": 3}, ["'lenet'", "'depth'", "width"]),
        ("lenet", {"width": 0}, ["width 0"]),
        ("lenet", {"num_classes": 0}, ["num_classes 0"]),
        ("mlp", {"sizes": (3,)}, ["(3,)"]),
        ("simple_cnn", {"image_size": 10}, ["image_size 10", "4"]),
        ("vgg11", {"image_size": 28}, ["image_size 28", "32"]),
        ("resnet18", {"stem": "large"}, ["'large'", "'imagenet'"]),
    ],
)
def test_what_makes_no_network_is_refused_in_one_line(name, options, words):
    with pytest.raises(UsageError) as caught:
        build(name, **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
