"""Inversion: made inputs are changed until the parents' BatchNorm layers see the statistics that they recorded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from weldnet.activations import run
from weldnet.fusion._averaged import Averaged

__all__ = ["Inverted", "invert"]

_BATCH = 128


@final
@dataclass(frozen=True)
class Inverted:
    """Inputs that were fitted to recorded statistics.

    Args:
        inputs: as many, of the same shape.
        before: the misfit of the inputs that were given, mean over batches.
        after: that of these.
    """

    inputs: Tensor
    before: float
    after: float


def invert(averaged: Averaged, inputs: Tensor, *, steps: int, rate: float) -> Inverted | None:
    """Lower the misfit between what the parents' BatchNorm layers see and what they recorded, by steps of Adam.

    The misfit of a layer is the mean over its channels of::

        (mean - recorded mean)^2 / recorded variance + log(variance / recorded variance)^2 / 4

    over a batch of at most 128 inputs; it is averaged over layers, and by shares over parents. Every batch is fitted to
    all parents at once, by the same number of steps of falling size; one that got no better stays as it was.

    Args:
        averaged: whose parents.
        inputs: floating, shape (N, ...); not changed.
        steps: of Adam, for every batch.
        rate: size of the first ones, in the unit of the inputs.

    Returns:
        None if no parent reaches a BatchNorm with recorded statistics, or no gradient leads from there to the inputs.

    Source: Yin et al., "Dreaming to distill" (DeepInversion), CVPR 2020, https://arxiv.org/abs/1912.08795, the feature
    term; no classes are asked for, and the start is noise with the spectrum of pictures in place of other priors.
    """
    parents: list[tuple[nn.Module, float]] = []
    for name, share in averaged.shares.items():
        if share > 0:
            run(averaged.parents[name], inputs[:1])  # names what does not fit
            parents.append((copy.deepcopy(averaged.parents[name]).eval().requires_grad_(False), share))
    batches = inputs.tensor_split(max(1, round(len(inputs) / _BATCH)))
    found = [_fit(parents, batch, steps, rate) for batch in batches]
    if any(each is None for each in found):
        return None
    done = [each for each in found if each is not None]
    before = sum(first * len(batch) for batch, first, _ in done) / len(inputs)
    after = sum(last * len(batch) for batch, _, last in done) / len(inputs)
    return Inverted(torch.cat([batch for batch, _, _ in done]), before, after)


def _fit(
    parents: Sequence[tuple[nn.Module, float]], batch: Tensor, steps: int, rate: float
) -> tuple[Tensor, float, float] | None:
    first, _ = parents[0]
    like = next((p for p in first.parameters() if p.is_floating_point()), torch.zeros(()))
    free = batch.to(like.device, like.dtype, copy=True).requires_grad_()
    adam = torch.optim.Adam([free], lr=rate)
    losses: list[float] = []
    best = batch
    with torch.enable_grad():
        for step in range(steps + 1):
            loss = _misfit(parents, free)
            if loss is None or not loss.requires_grad:
                return None
            now = float(loss.detach())
            if not losses or now < min(losses):
                best = free.detach().to(batch, copy=True)
            losses.append(now)
            (free.grad,) = torch.autograd.grad(loss, [free])
            for group in adam.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / max(1, steps))) / 2
            adam.step()
    return best, losses[0], min(losses)


def _misfit(parents: Sequence[tuple[nn.Module, float]], inputs: Tensor) -> Tensor | None:
    total: Tensor | None = None
    for network, share in parents:
        with _watched(network) as terms:
            network(inputs * 1)  # a model may write into what it is given
        if terms:
            part = share * torch.stack(terms).mean()
            total = part if total is None else total + part.to(total.device)
    return total


@contextmanager
def _watched(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the misfit of every BatchNorm layer that the network calls."""
    terms: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        rows = given[0].transpose(0, 1).flatten(1)
        recorded = module.running_var + module.eps
        shift = (rows.mean(1) - module.running_mean).square() / recorded
        spread = ((rows.var(1, unbiased=False) + module.eps) / recorded).log().square() / 4
        terms.append((shift + spread).mean())

    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [module.register_forward_pre_hook(note) for module in norms]
    try:
        yield terms
    finally:
        for hook in hooks:
            hook.remove()
