"""Width scaling and initialisation shared by the reference networks."""

from __future__ import annotations

from torch import nn

from weldnet.errors import UsageError


def scaled(units: int, width: float) -> int:
    """Scale a layer's unit count by `width`: rounded, never below one.

    >>> scaled(64, 0.25), scaled(6, 0.01)
    (16, 1)
    """
    if not width > 0:
        raise UsageError(f"width {width!r} is not a positive number; 1.0 is the published network")
    return max(1, round(units * width))


def check_classes(num_classes: int) -> None:
    """Refuse an output layer without units.

    Raises:
        UsageError: if `num_classes` is below one.
    """
    if num_classes < 1:
        raise UsageError(f"num_classes {num_classes!r} is below 1; give the number of classes of the data")


def initialise_kaiming(model: nn.Module) -> None:
    """Set convolutions to Kaiming normal (fan out, ReLU), norms to one and zero, linear layers to N(0, 0.01).

    This is torchvision's scheme; with PyTorch's default, deep networks without batch norm do not learn.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
