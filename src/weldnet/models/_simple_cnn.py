"""A small convolutional network that also works on 8x8 images."""

from __future__ import annotations

from torch import Tensor, nn

from weldnet.errors import UsageError
from weldnet.models._width import check_classes, scaled


class SimpleCNN(nn.Module):
    """Three 3x3 convolutions, two of them pooled, then one linear layer on the flattened map.

    Raises:
        UsageError: if `image_size` is not a positive multiple of 4.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: float = 1.0):
        super().__init__()
        check_classes(num_classes)
        if image_size < 4 or image_size % 4:
            raise UsageError(f"image_size {image_size!r} is not a positive multiple of 4; two poolings halve it twice")
        first, second, third = (scaled(units, width) for units in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(third * (image_size // 4) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes)."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        return self.fc(self.conv3(x).relu().flatten(1))


def simple_cnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: float = 1.0) -> SimpleCNN:
    """Build the small convolutional network for square images of `image_size` (8, 28, 32, ...)."""
    return SimpleCNN(num_classes, in_channels, image_size, width)
