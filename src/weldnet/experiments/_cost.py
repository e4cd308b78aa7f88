"""What cells cost, roughly: enough to order them, to bound memory, and for a time to finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch.utils.flop_counter import FlopCounterMode

from weldnet import models
from weldnet.errors import ModelError

__all__ = ["Cost", "forward_cost"]

#: Floating-point operations a second of one core, and seconds a sample besides: measured on one Xeon core with small
#: networks of this package. Only ratios matter for anything but the printed estimates.
_SPEED = 1.2e11
_SAMPLE = 1.5e-5
_BASE = 700 << 20


@final
@dataclass(frozen=True)
class Cost:
    """Of one architecture on one dataset.

    Args:
        operations: floating-point operations of one image's forward pass.
        parameters: numbers in the network.
        rows: training images.
        memory: bytes of a process that trains it.
    """

    operations: float
    parameters: int
    rows: int
    memory: int

    def training(self, epochs: int) -> float:
        """Return the seconds of some epochs on one core."""
        return epochs * self.rows * (3 * self.operations / _SPEED + 2 * _SAMPLE)

    def pass_over(self, rows: int) -> float:
        """Return the seconds of one pass over images."""
        return rows * (self.operations / _SPEED + _SAMPLE)


def forward_cost(model: str, options: Mapping[str, Any], shape: tuple[int, ...], classes: int, rows: int) -> Cost:
    """Estimate the cost of a network, and find out that it takes such images and answers with such classes.

    Args:
        model: a name of ``weldnet.models``.
        options: of its factory.
        shape: of an image, (C, H, W); empty where it is not known, which checks nothing.
        classes: how many there are.
        rows: training images.

    Raises:
        UsageError: there is no such model or option.
        ModelError: it does not take such images, or has too few outputs.
    """
    frozen = tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in options.items()))
    operations, parameters, outputs = _measured(model, frozen, shape)
    if shape and outputs < classes:
        raise ModelError(f"model {model!r} has {outputs} outputs and the data {classes} classes; set num_classes")
    pixels = 4 * torch.Size(shape).numel() if shape else 0
    return Cost(operations, parameters, rows, int(_BASE + 1.5 * rows * pixels + 64 * parameters))


@lru_cache(maxsize=256)
def _measured(model: str, options: tuple[tuple[str, Any], ...], shape: tuple[int, ...]) -> tuple[float, int, int]:
    with torch.device("meta"):
        network = models.build(model, **dict(options)).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if not shape:
        return 0.0, parameters, 0
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            found = network(torch.empty(1, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(f"model {model!r} does not take images of shape {shape} ({why})") from error
    return float(counter.get_total_flops()), parameters, int(found.shape[1])
