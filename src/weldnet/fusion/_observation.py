"""What a step of the network under repair does, and its parents beside it, on all unlabelled inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from weldnet.fusion._affine import read_matrix, read_rows, write_matrix
from weldnet.fusion._bench import Bench, Step
from weldnet.fusion._sums import ChannelSums

__all__ = ["Observation", "Sample", "observe", "read_slope", "rescale", "write_slope"]


@final
@dataclass(frozen=True)
class Sample:
    """Some rows of a step.

    Args:
        x: what its affine layer reads, shape (rows, groups, width); empty without an affine layer.
        inner: what its norm is given, or its affine layer gives, shape (rows, channels).
        mean: the parents' mean output, shape (rows, channels).
        rectified: the parents' mean output after a ReLU, if the step is rectified; else empty.
    """

    x: Tensor
    inner: Tensor
    mean: Tensor
    rectified: Tensor


@final
@dataclass
class Observation:
    """Statistics over all rows, and a sample of them.

    Attributes:
        inner: of what the step's norm is given, or its affine layer gives.
        out: of the step's output.
        parents: of each parent's output, carried to the universe.
        sample: some rows, if they were asked for.
    """

    inner: ChannelSums = field(default_factory=ChannelSums)
    out: ChannelSums = field(default_factory=ChannelSums)
    parents: dict[str, ChannelSums] = field(default_factory=dict[str, ChannelSums])
    sample: Sample | None = None


def observe(bench: Bench, step: Step, batches: Sequence[Tensor], *, rows: int = 0, seed: int = 0) -> Observation:
    """Run the network and its parents up to a step.

    Args:
        bench: the network and its parents.
        step: where to compare.
        batches: unlabelled inputs.
        rows: how many rows to sample; all if there are fewer.
        seed: of the choice.
    """
    found = Observation(parents={name: ChannelSums() for name in bench.shares})
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(len, batches))
    parts: list[Sample] = []
    for inputs in batches:
        calls = bench.own(step, inputs)
        parents = bench.parents(step, inputs)
        for call in calls:
            found.inner.add(call.inner)
            found.out.add(call.out)
        for name, values in parents.items():
            found.parents[name].add(values)
        if not rows:
            continue
        mean, rectified = bench.mean(parents, step), None
        if step.rectified:
            rectified = bench.mean({name: values.relu() for name, values in parents.items()}, step)
        start = 0
        quota = max(1, rows * len(inputs) // (total * len(calls)))
        for call in calls:
            count = len(call.out)
            chosen = torch.arange(count) if count <= quota else torch.randperm(count, generator=generator)[:quota]
            chosen = chosen.to(call.out.device)
            x = call.out.new_zeros(len(chosen), 1, 0)
            if step.affine is not None:
                x = read_rows(bench.modules[step.affine.name], call.given, chosen)
            at = start + chosen
            cut = mean.new_zeros(0) if rectified is None else _wide(rectified[at])
            parts.append(Sample(_wide(x), _wide(call.inner[chosen]), _wide(mean[at]), cut))
            start += count
    if parts:
        found.sample = Sample(
            *(torch.cat([getattr(p, key) for p in parts]) for key in ("x", "inner", "mean", "rectified"))
        )
    return found


def rescale(bench: Bench, step: Step, found: Observation, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Give every channel of a step the deviation that its parents have on average, and their mean.

    Args:
        bench: the network, which is changed, and its parents.
        step: which layers.
        found: what they do.
        shift: whether the means are matched too, where there is a bias; with a BatchNorm they always are.

    Returns:
        Slope and offset: the step's output is now ``slope * inner + offset`` of what ``inner`` was.
    """
    norm = bench.modules[step.norm.name] if step.norm is not None else None
    own = found.inner.deviation
    wanted = bench.mean({name: sums.deviation for name, sums in found.parents.items()}, step)
    center = bench.mean({name: sums.mean for name, sums in found.parents.items()}, step)
    alive = own > 1e-12 * own.max()
    if isinstance(norm, _BatchNorm):
        slope = torch.where(alive, wanted / own.where(alive, torch.ones_like(own)), read_slope(norm).abs())
        if norm.affine:
            slope = torch.where(norm.weight.double() < 0, -slope, slope)
        offset = center - slope * found.inner.mean
        write_slope(norm, slope, offset, found.inner.mean, found.inner.variance)
        return slope, offset
    assert step.affine is not None
    module = bench.modules[step.affine.name]
    slope = torch.where(alive, wanted / own.where(alive, torch.ones_like(own)), torch.ones_like(own))
    offset = torch.zeros_like(slope)
    matrix = read_matrix(module)
    write_matrix(module, matrix * slope.reshape(len(matrix), 1, -1).to(matrix.dtype))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        if shift:
            offset = center - slope * found.inner.mean
        with torch.no_grad():
            bias.copy_(bias.double() * slope + offset)
    return slope, offset


def read_slope(norm: nn.Module) -> Tensor:
    """Return what a BatchNorm with running statistics multiplies every channel with, float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    slope = (norm.running_var.double() + norm.eps).rsqrt()
    return slope if not norm.affine else slope * norm.weight.double()


def write_slope(norm: nn.Module, slope: Tensor, offset: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Make a BatchNorm compute ``slope * x + offset`` with the given running statistics.

    One without a weight of its own only takes the statistics.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if norm.affine:
            # From the statistics as they are kept, so that the product is right to the last bit but one.
            kept = norm.running_var.double() + norm.eps
            norm.weight.copy_(slope * kept.sqrt())
            norm.bias.copy_(offset + slope * norm.running_mean.double())


def _wide(rows: Tensor) -> Tensor:
    """At least float32: half precision has no room for sums of products."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
