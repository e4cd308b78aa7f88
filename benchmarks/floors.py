"""What a step must cost at least: floating-point operations and bytes, and this machine's rates for both.

The rates are measured in the same process as the steps, and for steps of milliseconds around each of their runs: a
product of two 1024 x 1024 matrices in float32, and a copy of 64 MB into memory that is there. Both, like all steps, in
CPU seconds of one thread, so that other work on the machine disturbs them little.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from weldnet.structure import Place, Structure

ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """How much a step has to do: floating-point operations in matrix products, and bytes to copy."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@functools.cache
def _arrays() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(1 << 24)
    return torch.randn(1024, 1024), torch.randn(1024, 1024), x, torch.empty_like(x)


@dataclass(frozen=True)
class Rates:
    """What this machine does in a CPU second."""

    flops: float
    bytes: float

    @staticmethod
    def measure(rounds: int = 9) -> Rates:
        a, b, x, y = _arrays()
        product = min(cpu_seconds(lambda: a @ b, rounds)[0])
        copy = min(cpu_seconds(lambda: y.copy_(x), rounds)[0])
        return Rates(2 * 1024**3 / product, 4 * x.numel() / copy)

    def floor(self, work: Work) -> float:
        """Return the seconds that the work takes at these rates."""
        return work.flops / self.flops + work.bytes / self.bytes


def cpu_seconds(step: Callable[[], Any], rounds: int = ROUNDS, warm: bool = True) -> tuple[list[float], Any]:
    """Run a step several times; return the CPU seconds of each, and what the last one returned."""
    result = step() if warm else None
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = step()
        seconds.append(time.process_time() - start)
    return seconds, result


def beside(step: Callable[[], Any], work: Work, rounds: int) -> tuple[list[float], list[float]]:
    """Run a step several times, and measure the rates between its runs; return the seconds and the floors."""
    step()
    seconds: list[float] = []
    floors: list[float] = []
    for _ in range(rounds):
        seconds += cpu_seconds(step, ROUNDS, warm=False)[0]
        floors.append(Rates.measure(3).floor(work))
    return seconds, floors


def middle(seconds: list[float]) -> float:
    return median(seconds)


def peak_mb() -> float:
    """The largest resident memory of this whole process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def size_of(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def sweep(structure: Structure, *, soft: bool = True) -> Work:
    """All affinities of a pair, once: in every place the other axes are carried, and the rows compared."""
    total = Work()
    for place in structure.places:
        numel = _numel(structure, place)
        others = {p.space: p for p in structure.places_in(place.tensor) if p.axes != place.axes}
        units = [structure.space(name).size for name in others]
        carry = Work(flops=2.0 * numel * sum(units)) if soft else Work(bytes=4.0 * numel * len(units))
        total += carry + Work(flops=2.0 * numel * structure.space(place.space).size)
    return total


def assignments(structure: Structure) -> Work:
    """One linear assignment a space has to read its scores, in float64."""
    return Work(bytes=sum(8.0 * space.size**2 for space in structure.roots))


def _numel(structure: Structure, place: Place) -> int:
    numel = 1
    for extent in structure.shapes[place.tensor]:
        numel *= extent
    return numel
