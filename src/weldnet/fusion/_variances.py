"""Variances: how much of its parents' activations a network has, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from weldnet._arrays import send
from weldnet._modules import home
from weldnet.activations import Inputs, find_layers, observed, run, unlabelled_batches
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._sums import ChannelSums

__all__ = ["variance_ratios", "variances", "with_variances"]

#: Inputs that are enough to measure a variance.
_SAMPLES = 256


def with_variances(averaged: Averaged, repaired: Repaired, data: Inputs | None) -> Repaired:
    """Add the variances before and after to what a repair measured, if there are inputs to measure them on."""
    if data is None or "variance" in repaired.numbers:
        return repaired
    where = home(averaged.model)
    batches = [send(inputs, where) for inputs in unlabelled_batches(data, samples=_SAMPLES)]
    found = variances(averaged, repaired.model, batches)
    return replace(repaired, numbers={**repaired.numbers, "variance": found})


def variances(averaged: Averaged, repaired: nn.Module, batches: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Return the variance of every affine layer's outputs before and after a repair, in parts of the parents'.

    Returns:
        By layer ``{"before": ..., "after": ...}``; 1 is as much as the parents have on average.
    """
    before = variance_ratios(averaged, averaged.model, batches)
    after = before if repaired is averaged.model else variance_ratios(averaged, repaired, batches)
    return {name: {"before": ratio, "after": after[name]} for name, ratio in before.items() if name in after}


def variance_ratios(averaged: Averaged, model: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """Return for each affine layer the mean variance of its channels over the mean, by shares, of the parents'."""
    own = _totals(model, averaged, batches)
    parents: dict[str, float] = {}
    for name, share in averaged.shares.items():
        if share > 0:
            for layer, value in _totals(averaged.parents[name], averaged, batches, name).items():
                parents[layer] = parents.get(layer, 0.0) + share * value
    return {layer: value / parents[layer] for layer, value in own.items() if parents.get(layer, 0.0) > 0}


def _totals(
    network: nn.Module, averaged: Averaged, batches: Sequence[Tensor], parent: str | None = None
) -> Mapping[str, float]:
    structure = averaged.structures.get(parent, averaged.structure) if parent else averaged.structure
    layers = [layer for layer in find_layers(network, structure) if layer.kind == "affine"]
    sums: dict[str, ChannelSums] = {}
    with observed(network, layers, lambda x, given, out: sums.setdefault(x.name, ChannelSums()).add(x.rows(out))):
        for inputs in batches:
            run(network, inputs)
    return {name: float(found.variance.mean()) for name, found in sums.items()}
