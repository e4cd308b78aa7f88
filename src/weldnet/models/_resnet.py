"""ResNet with torchvision's parameter names, for small and for large images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from weldnet.errors import UsageError
from weldnet.models._width import check_classes, initialise_kaiming, scaled

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, units: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, units, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(units)
        self.conv2 = nn.Conv2d(units, units, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(units)
        self.downsample = _shortcut(inputs, units, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, units, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions beside a shortcut; outputs are four times the units."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, units: int, stride: int):
        super().__init__()
        outputs = units * self.expansion
        self.conv1 = nn.Conv2d(inputs, units, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(units)
        self.conv2 = nn.Conv2d(units, units, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(units)
        self.conv3 = nn.Conv2d(units, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4 * units, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()


class ResNet(nn.Module):
    """Residual stages, global average pooling and one linear layer.

    He et al., "Deep residual learning for image recognition" (2016). `stem="cifar"` starts with a 3x3
    convolution of stride 1; `stem="imagenet"` with a 7x7 convolution of stride 2 and a max pooling, as
    torchvision does.

    Args:
        block: the residual block.
        depths: blocks of every stage.
        units: units of every stage, before scaling by `width`.
        num_classes: outputs.
        in_channels: channels of the images.
        width: scales every hidden layer.
        stem: the first layers.

    Raises:
        UsageError: if `stem` is not one of the two.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        units: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        stem: Stem = "cifar",
    ):
        super().__init__()
        check_classes(num_classes)
        if stem not in ("cifar", "imagenet"):
            raise UsageError(f"stem {stem!r} is unknown; choose 'cifar' (3x3) or 'imagenet' (7x7 and pooling)")
        channels = scaled(units[0], width)
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(
            in_channels, channels, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self._stages = len(depths)
        for index, (depth, stage_units) in enumerate(zip(depths, units, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, scaled(stage_units, width), stride))
                channels = scaled(stage_units, width) * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for index in range(self._stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem: Stem = "cifar") -> ResNet:
    """Build ResNet-18 (11.2 million parameters at full width)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes, in_channels, width, stem)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build the three-stage ResNet-20, with 1x1 convolutions as shortcuts (0.27 million parameters)."""
    return ResNet(BasicBlock, (3, 3, 3), (16, 32, 64), num_classes, in_channels, width)


def resnet50(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem: Stem = "cifar") -> ResNet:
    """Build ResNet-50 (23.5 million parameters at full width)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, in_channels, width, stem)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
