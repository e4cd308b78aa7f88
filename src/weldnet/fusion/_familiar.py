"""Whether unlabelled inputs look like those that the parents were trained on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from weldnet._arrays import send
from weldnet._modules import home
from weldnet.activations import Inputs, Layer, find_layers, observed, run, unlabelled_batches
from weldnet.fusion._averaged import Averaged
from weldnet.fusion._sums import ChannelSums

__all__ = ["strangeness"]

_SHIFT, _SPREAD, _SAMPLES = 1.0, 4.0, 256


def strangeness(averaged: Averaged, data: Inputs | None) -> tuple[str, ...]:
    """Say how the data differ from what the parents' first BatchNorm has recorded, if they do.

    They differ if a typical (median) channel's mean is off by a recorded deviation or more, or its variance by a factor
    of 4 or more.
    """
    if data is None:
        return ()
    batches = [send(inputs, home(averaged.model)) for inputs in unlabelled_batches(data, samples=_SAMPLES)]
    for name, parent in averaged.parents.items():
        norm, sums = _first_norm(averaged, name, parent, batches)
        if norm is None or norm.running_mean is None or norm.running_var is None or not sums.count:
            continue
        recorded = norm.running_var.double() + norm.eps
        shift = float(((sums.mean - norm.running_mean.double()).abs() / recorded.sqrt()).median())
        spread = float(((sums.variance + norm.eps) / recorded).log().median().exp())
        if shift >= _SHIFT or not 1 / _SPREAD < spread < _SPREAD:
            return (
                f"the unlabelled data are not what {name!r} was trained on: at its first BatchNorm a typical channel's "
                f"mean is off by {shift:.1f} recorded deviations and its variance is {spread:.2g} times the recorded "
                "one; are they preprocessed as in training?",
            )
    return ()


def _first_norm(
    averaged: Averaged, name: str, parent: nn.Module, batches: Sequence[Tensor]
) -> tuple[_BatchNorm | None, ChannelSums]:
    modules = dict(parent.named_modules())
    structure = averaged.structures.get(name, averaged.structure)
    norms = [x for x in find_layers(parent, structure) if isinstance(modules[x.name], _BatchNorm)]
    sums = ChannelSums()
    called: list[str] = []

    def visit(layer: Layer, given: Tensor, out: Tensor) -> None:
        called.append(layer.name)
        if layer.name == called[0]:
            sums.add(layer.rows(given))

    if not norms:
        return None, sums
    with observed(parent, norms, visit):
        for inputs in batches:
            run(parent, inputs)
    module = modules[called[0]] if called else None
    return (module if isinstance(module, _BatchNorm) else None), sums
