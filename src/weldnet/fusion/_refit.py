"""Refit: every layer of the averaged network is solved anew by least squares on unlabelled inputs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.fusion._affine import read_matrix, row_width, write_matrix
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._bench import Bench, Step
from weldnet.fusion._least_squares import Ridge
from weldnet.fusion._observation import Observation, Sample, observe, read_slope, rescale, write_slope
from weldnet.fusion._samples import gather

__all__ = ["Refit"]

#: Numbers that a layer's sampled rows may hold, so that memory is bounded: 256 MB of float32.
_ROOM = 1 << 26


@final
@dataclass(frozen=True, kw_only=True)
class Refit:
    """Solve layer by layer for the weights with which the fused network does what its parents do on average.

    In the order in which they run, every affine layer is solved so that from what the fused network itself gives it,
    the earlier layers being mended, it reproduces the mean, by shares, of its parents' outputs, their channels carried
    to the universe::

        min |x W + b - target|^2 + ridge * d * |W - W_before|^2,    d = mean diagonal of x^T x

    Where a ReLU is all that reads the output z, what counts is the mean h of the parents' *rectified* outputs: the loss
    is ``(z - h)^2`` where h > 0 and ``relu(z)^2`` elsewhere. It is convex, and each of the ``rounds`` solves a problem
    of least squares that bounds it from above, with the target ``min(z, 0)`` where h = 0. A BatchNorm behind the layer
    first gets the parents' means and deviations and is solved through.

    Args:
        ridge: pull to the weights before, in parts of the mean diagonal; 0 or more.
        rounds: how often a rectified layer is solved.
        samples: inputs to use at most.
        rows: positions of a layer's outputs to use at most (a seeded choice); fewer for very wide layers.
        batch_size: inputs a batch, for data that does not come in batches.
    """

    ridge: float = 0.1
    rounds: int = 3
    samples: int = 1024
    rows: int = 32768
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise UsageError(f"{self}: ridge must be 0 or more")
        if self.rounds < 1 or self.samples < 2 or self.rows < 2 or self.batch_size < 1:
            raise UsageError(f"{self}: rounds and batch_size must be at least 1, samples and rows at least 2")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a refitted copy.

        Raises:
            DataError: there is no data, fewer than two inputs, inputs that the model rejects, or, with a ridge of 0,
                too few of them to determine the weights.
        """
        batches, count = gather("refit", averaged, data, self.samples, self.batch_size)
        model = copy.deepcopy(averaged.model)
        bench = Bench(averaged, model)
        steps = bench.steps(batches[0])
        short = 0
        for step in steps:
            width = row_width(bench.modules[step.affine.name]) if step.affine else 1
            rows = max(2, min(self.rows, _ROOM // max(1, width)))
            found = observe(bench, step, batches, rows=rows, seed=averaged.seed)
            short += found.sample is not None and len(found.sample.x) < width
            self._solve(bench, step, found)
        few = f"; {short} of them had fewer rows than weights an output: the ridge decided the rest" if short else ""
        return Repaired(model, f"refit: {len(steps)} layers solved on {count} unlabelled inputs{few}")

    def _solve(self, bench: Bench, step: Step, found: Observation) -> None:
        norm = bench.modules[step.norm.name] if step.norm else None
        if norm is None:
            self._solve_plain(bench, step, found)
        else:
            assert isinstance(norm, _BatchNorm)
            self._solve_through(norm, bench, step, found)

    def _solve_plain(self, bench: Bench, step: Step, found: Observation) -> None:
        assert step.affine is not None
        assert found.sample is not None
        module = bench.modules[step.affine.name]
        bias = getattr(module, "bias", None)
        change, shift = self._descend(found.sample, found.sample.inner, fits_shift=isinstance(bias, Tensor))
        write_matrix(module, read_matrix(module).double() + change)
        if isinstance(bias, Tensor):
            with torch.no_grad():
                bias.copy_(bias.double() + shift)

    def _solve_through(self, norm: _BatchNorm, bench: Bench, step: Step, found: Observation) -> None:
        """Solve for ``slope * (x W) + offset``; the norm then gets the statistics that the new weights give."""
        slope, offset = rescale(bench, step, found, shift=True)
        if step.affine is None:
            return
        sample = found.sample
        assert sample is not None
        if not norm.affine:
            slope = read_slope(norm)
            offset = -slope * found.inner.mean
        kind = sample.inner.dtype
        out = sample.inner * slope.to(kind) + offset.to(kind)
        change, shift = self._descend(sample, out, fits_shift=norm.affine)
        # A channel that the norm all but silences stays as it is.
        safe = slope.abs() > 1e-4 * slope.abs().max()
        module = bench.modules[step.affine.name]
        matrix = read_matrix(module).double()
        change = change * torch.where(safe, 1 / slope, torch.zeros_like(slope)).reshape(len(matrix), 1, -1)
        write_matrix(module, matrix + change)
        inner = sample.inner + _product(sample.x, change)
        write_slope(norm, slope, offset + shift * safe, inner.mean(0).double(), inner.double().var(0, correction=0))

    def _descend(self, sample: Sample, out: Tensor, *, fits_shift: bool) -> tuple[Tensor, Tensor]:
        """Return what the layer's weights and bias change by, its outputs being ``out``."""
        ridge = Ridge(sample.x, self.ridge, shift=fits_shift)
        if not len(sample.rectified):
            return ridge.solve(sample.mean - out)
        change, shift = ridge.solve(_missing(sample.rectified, out))
        for _ in range(self.rounds - 1):
            now = out + _product(sample.x, change) + shift.to(out.dtype)
            more, further = ridge.solve(_missing(sample.rectified, now))
            change, shift = change + more, shift + further
        return change, shift


def _missing(rectified: Tensor, out: Tensor) -> Tensor:
    """What an output lacks of the rectified mean; below 0 nothing is missing where the mean is 0."""
    return torch.where(rectified > 0, rectified - out, out.clamp_max(0) - out)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows (rows, groups, width) with (groups, width, outputs of a group): (rows, outputs)."""
    return torch.einsum("ngk,gko->ngo", x, matrix.to(x.dtype)).flatten(1)
