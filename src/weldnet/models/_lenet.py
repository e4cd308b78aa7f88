"""LeNet-5 with ReLU and max pooling."""

from __future__ import annotations

from torch import Tensor, nn

from weldnet.models._width import check_classes, scaled


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, for images of 28x28.

    LeCun et al., "Gradient-based learning applied to document recognition" (1998), in its modern form.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0):
        super().__init__()
        check_classes(num_classes)
        first, second = scaled(6, width), scaled(16, width)
        third, fourth = scaled(120, width), scaled(84, width)
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(second * 5 * 5, third)
        self.fc2 = nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, 28, 28) to logits (N, num_classes)."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        x = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())


def lenet(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> LeNet:
    """Build LeNet-5 for images of 28x28; `width` scales every hidden layer."""
    return LeNet(num_classes, in_channels, width)
