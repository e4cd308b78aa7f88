"""The loss on the straight line between two networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._modules import placed
from weldnet.errors import ModelError, UsageError
from weldnet.evaluation._scorer import Measure, choose_device, make_scorer

__all__ = ["Barrier", "barrier", "check_same", "other_scores"]


@final
@dataclass(frozen=True, kw_only=True)
class Barrier:
    """Values on the line (1 - t) a + t b between two networks.

    Attributes:
        points: the positions t, from 0 to 1.
        values: the loss there.
        scores: what else was measured there, by name, such as ``accuracy``.
    """

    points: tuple[float, ...]
    values: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    @property
    def excess(self) -> tuple[float, ...]:
        """How far each value lies above the line between the two ends."""
        first, last = self.values[0], self.values[-1]
        return tuple(value - ((1 - t) * first + t * last) for t, value in zip(self.points, self.values, strict=True))

    @property
    def height(self) -> float:
        """The barrier: the largest excess, never below zero; NaN if a value is NaN."""
        return torch.tensor((0.0, *self.excess), dtype=torch.float64).max().item()

    @property
    def area(self) -> float:
        """The mean excess along the line, zero where it is below; a broad barrier has more than a narrow one.

        Trapezoidal rule over t; NaN if a value is NaN.
        """
        above = torch.tensor(self.excess, dtype=torch.float64).clamp(min=0).tolist()
        sides = zip(pairwise(self.points), pairwise(above), strict=True)
        return sum((right - left) * (low + high) / 2 for (left, right), (low, high) in sides)

    def __str__(self) -> str:
        top = self.excess.index(self.height) if self.height > 0 else None
        return (
            f"barrier {self.height:.4f}, area {self.area:.4f} on {len(self.points)} points: loss {self.values[0]:.4f} "
            f"and {self.values[-1]:.4f} at the ends"
            + ("" if top is None else f", {self.values[top]:.4f} at t = {self.points[top]:.2f}")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the curve, its height (``barrier``) and its area as plain data."""
        found = {name: list(values) for name, values in self.scores.items()}
        return {
            "points": list(self.points),
            "loss": list(self.values),
            **found,
            "barrier": self.height,
            "area": self.area,
        }


def barrier(
    a: nn.Module,
    b: nn.Module,
    *,
    evaluate: Measure,
    points: int = 25,
    device: torch.device | str | None = None,
) -> Barrier:
    """Measure the barrier between two networks: max over t of L(t) - ((1 - t) L(0) + t L(1)).

    Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis" (2020). Floating parameters
    and buffers are interpolated; integer buffers are those of `a`.

    Args:
        a: the network at t = 0; not changed.
        b: the network at t = 1, with the same parameters; not changed.
        evaluate: labelled data; or a function that is given a copy in evaluation mode and returns its loss, or
            numbers by name, of which ``loss`` makes the barrier.
        points: positions on the line, both ends included.
        device: where to compute on labelled data; by default where `a` is.

    Returns:
        The curve; its ``height`` is the barrier.

    Raises:
        ModelError: if a tensor is missing in one network or has another shape.
        UsageError: if there are fewer than two points, or there is no such device.
        DataError: if labelled data does not fit.

    >>> flat = barrier(nn.Linear(2, 1), nn.Linear(2, 1), evaluate=lambda model: 1.0, points=3)
    >>> flat.points, flat.height
    ((0.0, 0.5, 1.0), 0.0)
    """
    if points < 2:
        raise UsageError(f"points {points!r} is below 2; a line needs both of its ends")
    check_same({"a": a.state_dict(), "b": b.state_dict()})
    # Both go there once, and the networks in between are made there.
    target = choose_device(evaluate, device, a)
    a, b = (placed(network, target) for network in (a, b))
    first, last = a.state_dict(), b.state_dict()
    score = make_scorer(evaluate)
    probe = copy.deepcopy(a).eval()
    positions = tuple(index / (points - 1) for index in range(points))
    found: list[Mapping[str, float]] = []
    for position in positions:
        probe.load_state_dict(_between(first, last, position))
        found.append(score(probe))
        probe.eval()
    losses = tuple(entry["loss"] for entry in found)
    return Barrier(points=positions, values=losses, scores=other_scores(found))


def other_scores(found: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Return what was measured besides the loss, by name, one value a point."""
    return {name: tuple(entry[name] for entry in found) for name in found[0] if name != "loss"}


def check_same(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ModelError unless all networks have the same tensors as the first."""
    (name_a, first), *others = states.items()
    for name_b, other in others:
        for tensor in dict.fromkeys((*first, *other)):
            shapes = [tuple(state[tensor].shape) if tensor in state else None for state in (first, other)]
            if shapes[0] != shapes[1]:
                words = [f"has shape {shape}" if shape is not None else "is missing" for shape in shapes]
                raise ModelError(
                    f"tensor {tensor!r} {words[0]} in {name_a} and {words[1]} in {name_b}; "
                    "points between networks need one architecture"
                )


def _between(first: Mapping[str, Tensor], last: Mapping[str, Tensor], position: float) -> dict[str, Tensor]:
    return {
        name: torch.lerp(tensor, last[name].to(tensor), position) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
