"""VGG for small images: the convolutions, then a single linear classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from weldnet.errors import UsageError
from weldnet.models._width import check_classes, initialise_kaiming, scaled

# One tuple per stage; every stage ends in a 2x2 max pooling.
_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """3x3 convolutions in five pooled stages and one linear classifier.

    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition" (2015), in
    the CIFAR form of the model fusion literature. Parameters have torchvision's names (`features.N.weight`,
    `classifier.weight`).

    Raises:
        UsageError: if `image_size` is not a positive multiple of 32.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        batch_norm: bool = False,
        bias: bool = True,
        image_size: int = 32,
    ):
        super().__init__()
        check_classes(num_classes)
        if image_size < 32 or image_size % 32:
            raise UsageError(f"image_size {image_size!r} is not a positive multiple of 32; five poolings halve it")
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for units in stage:
                outputs = scaled(units, width)
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=bias))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(outputs))
                layers.append(nn.ReLU())
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // 32) ** 2, num_classes, bias=bias)
        initialise_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


def vgg11(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = False,
    bias: bool = True,
    image_size: int = 32,
) -> VGG:
    """Build VGG11: eight convolutions (9.2 million parameters at full width)."""
    return VGG(_VGG11, num_classes, in_channels, width, batch_norm, bias, image_size)


def vgg13(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = False,
    bias: bool = True,
    image_size: int = 32,
) -> VGG:
    """Build VGG13: ten convolutions (9.4 million parameters at full width)."""
    return VGG(_VGG13, num_classes, in_channels, width, batch_norm, bias, image_size)


def vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = False,
    bias: bool = True,
    image_size: int = 32,
) -> VGG:
    """Build VGG16: thirteen convolutions (14.7 million parameters at full width)."""
    return VGG(_VGG16, num_classes, in_channels, width, batch_norm, bias, image_size)
