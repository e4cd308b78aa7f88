"""The weighted average of state dicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weldnet._shares import check_weights
from weldnet.errors import FusionError, UsageError

__all__ = ["average", "normalise_weights"]

#: Sums in float64 are taken over pieces of this many numbers, which stay in the cache.
_PIECE = 1 << 16


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Average state dicts tensor by tensor.

    Floating tensors are summed in float64 and returned in the first network's dtype and on its device. Integer and
    boolean tensors are not averaged: equal ones are kept, scalar counters (such as ``num_batches_tracked``) take the
    largest value, and anything else that differs is an error.

    Args:
        states: two or more state dicts with equal keys and shapes; not changed.
        weights: one for each, not negative, summing to 1; equal if None.

    Returns:
        A new state dict.

    Raises:
        UsageError: the weights do not fit.
        FusionError: keys or shapes differ, or an integer tensor has no meaningful average.

    Example:
        >>> import torch
        >>> average([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}], weights=[0.25, 0.75])
        {'w': tensor([0.7500])}
    """
    shares = normalise_weights(weights, len(states))
    first = states[0]
    for number, state in enumerate(states[1:], start=2):
        different = sorted(first.keys() ^ state.keys())
        if different:
            raise FusionError(
                f"network 1 and network {number} differ in the tensor {different[0]!r}; fuse equal models"
            )
    return {name: _mean(name, [state[name] for state in states], shares) for name in first}


def normalise_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Check averaging weights: one for each network, finite, not negative, summing to 1.

    Raises:
        UsageError: with the offending number and what to do.
    """
    if count < 1:
        raise UsageError("there is no network to average; give two or more")
    if weights is None:
        return [1 / count] * count
    check_weights(weights, count)
    total = math.fsum(weights)
    return [w / total for w in weights]


def _mean_of_floats(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(wide), alpha=share)
    return total


def _mean(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape:
            raise FusionError(f"{name}: shapes {tuple(first.shape)} and {tuple(other.shape)} cannot be averaged")
        if other.is_floating_point() != first.is_floating_point():
            raise FusionError(f"{name}: dtypes {first.dtype} and {other.dtype} cannot be averaged; convert one of them")
    if first.is_floating_point() or first.is_complex():
        mean = torch.empty_like(first, requires_grad=False, memory_format=torch.contiguous_format)
        flat = [tensor.detach().to(first.device).reshape(-1) for tensor in tensors]
        for start in range(0, first.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            mean.view(-1)[piece] = _mean_of_floats([values[piece] for values in flat], shares)
        return mean
    if all(torch.equal(first, other.to(first.device, first.dtype)) for other in tensors[1:]):
        return first.detach().clone()
    if first.dim() == 0 and first.dtype != torch.bool:
        return torch.stack([t.to(first.device) for t in tensors]).max().to(first.dtype)
    raise FusionError(
        f"{name}: {str(first.dtype).removeprefix('torch.')} tensors of shape {tuple(first.shape)} differ between the "
        "networks and have no average; make them equal first (they are settings, not learned)"
    )
