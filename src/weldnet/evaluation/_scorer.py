"""From labelled data or a function to the numbers of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import nn

from weldnet._arrays import find_device
from weldnet._modules import home
from weldnet.errors import UsageError
from weldnet.evaluation._metrics import Metrics, evaluate
from weldnet.evaluation._predict import Labelled

__all__ = ["Measure", "choose_device", "make_scorer"]

Measure: TypeAlias = Labelled | Callable[[nn.Module], float | Metrics | Mapping[str, float]]
"""Labelled data, or a function of a network that returns its loss, `Metrics`, or numbers by name with a ``loss``."""


def make_scorer(measure: Measure) -> Callable[[nn.Module], Mapping[str, float]]:
    """Return a function that gives a network's numbers by name, one of which is the ``loss``."""

    def score(network: nn.Module) -> Mapping[str, float]:
        found = measure(network) if callable(measure) else evaluate(network, measure)
        if isinstance(found, Metrics):
            return found.scores
        if not isinstance(found, Mapping):
            return {"loss": float(found)}
        if "loss" not in found:
            raise UsageError(f"evaluate returned {', '.join(found) or 'nothing'} and no 'loss', which is to be low")
        return {name: float(value) for name, value in found.items()}

    return score


def choose_device(measure: Measure, device: torch.device | str | None, network: nn.Module) -> torch.device:
    """Return where networks are to be measured: on the device that is asked for, else where the network lies.

    A function is given networks that lie where this one does, and takes them on from there itself.

    Raises:
        UsageError: there is no such device.
    """
    asked = find_device(device)
    return home(network) if asked is None or callable(measure) else asked
