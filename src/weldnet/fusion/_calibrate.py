"""Calibrate: a temperature of the logits, so that the fused network is as sure as its parents' ensemble."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from weldnet.activations import Inputs, Layer, find_layers, observed, run
from weldnet.errors import UsageError
from weldnet.fusion._affine import read_matrix, write_matrix
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._guard import Guard, answers
from weldnet.fusion._samples import gather

__all__ = ["Calibrate"]

_RANGE = math.log(20.0)


@final
@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Divide the logits by the temperature at which the predictions are nearest to the parents' ensemble.

    The mean Kullback-Leibler divergence from the ensemble on unlabelled inputs is minimised over the inverse
    temperature (between 1/20 and 20, in which it is convex), which is folded into the last affine layer. No prediction
    changes its first place, only how sure it is.

    Args:
        samples: inputs to use at most.
        batch_size: inputs a batch, for data that does not come in batches.

    Source: Guo et al., "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599 (the temperature;
    there it is fitted to labels).
    """

    samples: int = 1024
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 1:
            raise UsageError(f"{self}: samples must be at least 2 and batch_size 1")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a calibrated copy.

        Raises:
            DataError: there is no data, or inputs that the model rejects.
            UsageError: the output is no vector of logits, or no affine layer gives it.
        """
        batches, count = gather("calibrate", averaged, data, self.samples, self.batch_size)
        guard = Guard(averaged, batches)
        model = copy.deepcopy(averaged.model)
        if not guard.is_classifier:
            raise UsageError(
                f"{type(model).__name__} gives no vector of logits that could be calibrated; leave 'calibrate' out"
            )
        layer = _last_layer(model, averaged, batches[0])
        logits = [answers(model, inputs, guard.outputs)[0].double() for inputs in batches]
        inverse = _fit(logits, [target for (target,) in guard.targets])
        _scale(dict(model.named_modules())[layer.name], inverse)
        numbers = {"temperature": 1 / inverse}
        return Repaired(model, f"calibrate: temperature {1 / inverse:.3g} from {count} unlabelled inputs", numbers)


def _last_layer(model: nn.Module, averaged: Averaged, inputs: Tensor) -> Layer:
    """Find the affine layer whose scale is that of the logits: the last one that is called, if the proof holds."""
    seen: list[Layer] = []
    affine = [x for x in find_layers(model, averaged.structure) if x.kind == "affine"]
    with observed(model, affine, lambda layer, given, out: seen.append(layer)):
        run(model, inputs)
    if seen:
        trial = copy.deepcopy(model)
        _scale(dict(trial.named_modules())[seen[-1].name], 0.5)
        outputs = averaged.structure.outputs or None
        (before,), (after,) = answers(model, inputs, outputs), answers(trial, inputs, outputs)
        wanted, found = (0.5 * before.double()).log_softmax(-1), after.double().log_softmax(-1)
        if torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
            return seen[-1]
    raise UsageError(
        f"no affine layer of {type(model).__name__} gives its logits, so that no temperature can be folded in; "
        "leave 'calibrate' out"
    )


def _fit(logits: list[Tensor], targets: list[Tensor]) -> float:
    """Minimise the convex divergence over the inverse temperature by golden sections of its logarithm."""

    def loss(position: float) -> float:
        scale = math.exp(position)
        parts = [(p * (scale * z).log_softmax(-1)).sum() for z, p in zip(logits, targets, strict=True)]
        return -sum(torch.stack(parts).cpu().tolist())

    ratio = (math.sqrt(5) - 1) / 2
    low, high = -_RANGE, _RANGE
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    best = (low + high) / 2
    # What is right already stays to the last bit.
    return 1.0 if loss(0.0) <= loss(best) else math.exp(best)


def _scale(module: nn.Module, factor: float) -> None:
    write_matrix(module, read_matrix(module) * factor)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.mul_(factor)
