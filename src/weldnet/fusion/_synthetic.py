"""Synthetic inputs, where there are none: noise fitted to what BatchNorm layers recorded, or random tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from weldnet._arrays import send
from weldnet._modules import home
from weldnet.activations import Inputs
from weldnet.errors import DataError, UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._inversion import invert
from weldnet.fusion._protocol import Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._variances import with_variances

__all__ = ["Synthetic", "make_inputs"]

#: Chosen on validation networks; natural pictures have about 1.
_STEEPNESS = 1.5


@final
@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Repair on inputs that are made, not given.

    They are noise, or random tokens. Where the parents have BatchNorm layers with recorded statistics, noise is
    then changed until these layers see what they recorded.

    Args:
        repair: what works on them.
        count: how many are made.
        steps: of that change; 0 leaves it out.
        rate: size of the first steps, in standard deviations of the inputs.
    """

    repair: Repair = field(default_factory=Refit)
    count: int = 512
    steps: int = 30
    rate: float = 0.05

    def __post_init__(self) -> None:
        if self.count < 2 or self.steps < 0:
            raise UsageError(f"{self}: count must be at least 2, and steps 0 or more")
        if not 0 < self.rate < math.inf:
            raise UsageError(f"{self}: rate must be above 0")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return what the repair makes on synthetic inputs; real ones are not looked at.

        Raises:
            DataError: the network takes something else than one tensor.
        """
        inputs = send(make_inputs(averaged.example_input, self.count, averaged.seed), home(averaged.model))
        fitted = None
        if self.steps and inputs.is_floating_point():
            fitted = invert(averaged, inputs, steps=self.steps, rate=self.rate)
        if fitted is not None:
            inputs = fitted.inputs
        found = with_variances(averaged, self.repair(averaged, inputs), inputs)
        found = replace(found, summary=f"synthetic: {found.summary.replace('unlabelled', 'synthetic')}")
        if fitted is None:
            return found
        said = f", fitted to BatchNorm statistics (misfit {fitted.before:.2g}, then {fitted.after:.2g})"
        misfit = {"misfit": {"before": fitted.before, "after": fitted.after}}
        return replace(found, summary=found.summary + said, numbers={**found.numbers, **misfit})


def make_inputs(example: object, count: int, seed: int) -> Tensor:
    """Return inputs of the example's shape, type and device.

    Floating tensors with two or more dimensions of space are noise whose amplitude falls with the frequency to the
    power of 1.5, nearly grey (every channel is 0.9 parts the first), each channel with mean 0 and deviation 1; other
    floating tensors are white noise; integers are drawn evenly from the largest one that the example holds and all
    below.

    Args:
        example: one tensor, shape (N, ...).
        count: how many.
        seed: of the noise.

    Raises:
        DataError: the example is no tensor, holds booleans, or has no dimension of samples.
    """
    if isinstance(example, tuple | list) and len(example) == 1:
        example = example[0]
    if not isinstance(example, Tensor) or example.dim() < 1 or example.dtype == torch.bool or example.is_complex():
        kind = f"a {type(example).__name__}" if not isinstance(example, Tensor) else f"{example.dtype}"
        raise DataError(
            f"synthetic inputs are made for networks that take one tensor of numbers, and the example input is {kind}; "
            "give data= (--data), or repair='weights'"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *example.shape[1:])
    if not example.is_floating_point():
        most = int(example.max()) if example.numel() else 0
        return torch.randint(0, max(most, 0) + 1, shape, generator=generator).to(example.device, example.dtype)
    noise = torch.randn(shape, generator=generator)
    if noise.dim() >= 4:
        noise = _standard(_grey(_coloured(noise)))
    return noise.to(example.device, example.dtype)


def _coloured(noise: Tensor) -> Tensor:
    """Divide every frequency by a power of its length; the space is what follows samples and channels."""
    dims = tuple(range(2, noise.dim()))
    spectrum = torch.fft.fftn(noise, dim=dims)
    squares = torch.zeros(noise.shape[2:])
    for axis, size in enumerate(noise.shape[2:]):
        view = [1] * len(dims)
        view[axis] = size
        squares = squares + torch.fft.fftfreq(size).reshape(view).square()
    lowest = 1 / max(noise.shape[2:])
    return torch.fft.ifftn(spectrum / squares.sqrt().clamp_min(lowest) ** _STEEPNESS, dim=dims).real


def _grey(noise: Tensor, share: float = 0.9) -> Tensor:
    """Mix every channel but the first with the first."""
    mixed = share * noise[:, :1] + (1 - share**2) ** 0.5 * noise
    return torch.cat([noise[:, :1], mixed[:, 1:]], 1)


def _standard(noise: Tensor) -> Tensor:
    dims = (0, *range(2, noise.dim()))
    centered = noise - noise.mean(dims, keepdim=True)
    return centered / centered.std(dims, keepdim=True).clamp_min(1e-12)
