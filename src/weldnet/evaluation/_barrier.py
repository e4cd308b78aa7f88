"""The loss on the straight line between two networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weldnet.errors import ModelError, UsageError


@dataclass(frozen=True, kw_only=True)
class Barrier:
    """Values on the line (1 - t) a + t b between two networks.

    Attributes:
        points: the positions t, from 0 to 1.
        values: what was measured there.
    """

    points: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def excess(self) -> tuple[float, ...]:
        """How far each value lies above the line between the two ends."""
        first, last = self.values[0], self.values[-1]
        return tuple(value - ((1 - t) * first + t * last) for t, value in zip(self.points, self.values, strict=True))

    @property
    def height(self) -> float:
        """The barrier: the largest excess, never below zero; NaN if a value is NaN."""
        return torch.tensor((0.0, *self.excess), dtype=torch.float64).max().item()


def barrier(a: nn.Module, b: nn.Module, *, evaluate: Callable[[nn.Module], float], points: int = 25) -> Barrier:
    """Measure the barrier between two networks: max over t of L(t) - ((1 - t) L(0) + t L(1)).

    Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis" (2020). Floating parameters
    and buffers are interpolated; integer buffers are those of `a`.

    Args:
        a: the network at t = 0; not changed.
        b: the network at t = 1, with the same parameters; not changed.
        evaluate: measures a network, lower being better; it is given a copy in evaluation mode.
        points: positions on the line, both ends included.

    Raises:
        ModelError: if a tensor is missing in one network or has another shape.
        UsageError: if there are fewer than two points.

    >>> flat = barrier(nn.Linear(2, 1), nn.Linear(2, 1), evaluate=lambda model: 1.0, points=3)
    >>> flat.points, flat.height
    ((0.0, 0.5, 1.0), 0.0)
    """
    if points < 2:
        raise UsageError(f"points {points!r} is below 2; a line needs both of its ends")
    first, last = a.state_dict(), b.state_dict()
    _check_same(first, last)
    probe = copy.deepcopy(a).eval()
    positions = tuple(index / (points - 1) for index in range(points))
    values: list[float] = []
    for position in positions:
        probe.load_state_dict(_between(first, last, position))
        values.append(float(evaluate(probe)))
        probe.eval()
    return Barrier(points=positions, values=tuple(values))


def _check_same(first: dict[str, Tensor], last: dict[str, Tensor]) -> None:
    for name in dict.fromkeys((*first, *last)):
        shapes = [tuple(state[name].shape) if name in state else None for state in (first, last)]
        if shapes[0] != shapes[1]:
            words = [f"has shape {shape}" if shape is not None else "is missing" for shape in shapes]
            raise ModelError(
                f"tensor {name!r} {words[0]} in a and {words[1]} in b; a line needs two networks of one architecture"
            )


def _between(first: dict[str, Tensor], last: dict[str, Tensor], position: float) -> dict[str, Tensor]:
    return {
        name: torch.lerp(tensor, last[name].to(tensor), position) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
