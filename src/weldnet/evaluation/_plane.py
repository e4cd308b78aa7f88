"""The loss on the plane through three networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._modules import placed
from weldnet.errors import ModelError, UsageError
from weldnet.evaluation._barrier import check_same, other_scores
from weldnet.evaluation._scorer import Measure, choose_device, make_scorer

__all__ = ["Plane", "plane"]

Grid = tuple[tuple[float, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Plane:
    """Values on a grid of the plane through three networks.

    Attributes:
        x: positions along the first axis, as distances between parameters; network a is at 0.
        y: positions along the second axis.
        values: the loss; ``values[j][i]`` is at ``(x[i], y[j])``.
        corners: where the three networks lie, (x, y) each.
        corner_values: their loss.
        scores: what else was measured, by name, as grids; such as ``accuracy``.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: Grid
    corners: tuple[tuple[float, float], ...]
    corner_values: tuple[float, ...]
    scores: Mapping[str, Grid] = field(default_factory=dict[str, Grid])

    def __str__(self) -> str:
        losses = [value for row in self.values for value in row]
        corners = ", ".join(
            f"{loss:.4f} at ({x:.2f}, {y:.2f})" for (x, y), loss in zip(self.corners, self.corner_values, strict=True)
        )
        return (
            f"plane of {len(self.x)} x {len(self.y)} points: loss {min(losses):.4f} to {max(losses):.4f}; "
            f"the networks' own {corners}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plane as plain data."""
        found = {name: [list(row) for row in grid] for name, grid in self.scores.items()}
        return {
            "x": list(self.x),
            "y": list(self.y),
            "loss": [list(row) for row in self.values],
            **found,
            "corners": [list(corner) for corner in self.corners],
            "corner_loss": list(self.corner_values),
        }


def plane(
    a: nn.Module,
    b: nn.Module,
    c: nn.Module,
    *,
    evaluate: Measure,
    points: int = 15,
    margin: float = 0.2,
    device: torch.device | str | None = None,
) -> Plane:
    """Measure the loss on a grid of the plane through three networks.

    The axes are orthonormal in the space of all parameters: ``u = b - a`` and ``v = (c - a) - <c - a, u> / |u|^2 u``,
    each divided by its length; a point is ``a + x u / |u| + y v / |v|``. Floating buffers (BatchNorm statistics) are
    mixed with the same shares as the parameters, as in :func:`weldnet.barrier`; outside the triangle they stay in
    the range of the three networks, since a variance must not become negative. Integer buffers are those of `a`.

    Args:
        a: the network at (0, 0); not changed.
        b: the network on the first axis; not changed.
        c: the third network; not changed.
        evaluate: as for :func:`weldnet.barrier`.
        points: positions on each axis; points x points networks are measured.
        margin: how far the grid goes beyond the three networks, as a share of their extent.
        device: where to compute on labelled data; by default where `a` is.

    Returns:
        The grid and the three networks in it.

    Raises:
        ModelError: if a tensor is missing or has another shape, or the three lie on one line.
        UsageError: if there are fewer than two points, the margin is below 0, or there is no such device.
        DataError: if labelled data does not fit.

    Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs" (2018),
    https://arxiv.org/abs/1802.10026, appendix A.1.

    >>> nets = [nn.Linear(2, 1) for _ in range(3)]
    >>> plane(*nets, evaluate=lambda model: 1.0, points=2).values
    ((1.0, 1.0), (1.0, 1.0))
    """
    if points < 2:
        raise UsageError(f"points {points!r} is below 2; a grid needs at least two on each axis")
    if not margin >= 0 or math.isinf(margin):
        raise UsageError(f"margin {margin!r} must be at least 0")
    target = choose_device(evaluate, device, a)
    check_same({name: network.state_dict() for name, network in zip("abc", (a, b, c), strict=True)})
    a, b, c = (placed(network, target) for network in (a, b, c))
    states = [network.state_dict() for network in (a, b, c)]
    learned = {name for name, _ in a.named_parameters()}
    width, across, height = _triangle(states, learned)
    corners = ((0.0, 0.0), (width, 0.0), (across, height))
    score = make_scorer(evaluate)
    probe = copy.deepcopy(a).eval()

    def measure(x: float, y: float) -> Mapping[str, float]:
        share_c = y / height
        probe.load_state_dict(_mixed(states, learned, (x - share_c * across) / width, share_c))
        found = score(probe)
        probe.eval()
        return found

    x = _axis(min(0.0, across), max(width, across), points, margin)
    y = _axis(0.0, height, points, margin)
    rows = [[measure(at, up) for at in x] for up in y]
    others = [other_scores(row) for row in rows]
    return Plane(
        x=x,
        y=y,
        values=tuple(tuple(found["loss"] for found in row) for row in rows),
        corners=corners,
        corner_values=tuple(measure(*corner)["loss"] for corner in corners),
        scores={name: tuple(row[name] for row in others) for name in others[0]},
    )


def _triangle(states: Sequence[Mapping[str, Tensor]], learned: set[str]) -> tuple[float, float, float]:
    """Return b's distance from a, and c's position along a to b and away from it."""
    bb, bc, cc = 0.0, 0.0, 0.0
    for name in learned:
        first = states[0][name].double()
        to_b, to_c = ((state[name].to(first) - first).flatten() for state in states[1:])
        bb, bc, cc = bb + float(to_b @ to_b), bc + float(to_b @ to_c), cc + float(to_c @ to_c)
    off = cc - bc * bc / bb if bb else 0.0
    if not off > 1e-12 * cc:
        raise ModelError("the three networks lie on one line; a plane needs three that do not, barrier measures a line")
    return math.sqrt(bb), bc / math.sqrt(bb), math.sqrt(off)


def _mixed(
    states: Sequence[Mapping[str, Tensor]], learned: set[str], share_b: float, share_c: float
) -> dict[str, Tensor]:
    """Return a + share_b (b - a) + share_c (c - a) for floating tensors; others are those of a."""
    mixed: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            mixed[name] = tensor
            continue
        first, second, third = (state[name].to(tensor.device, torch.float64) for state in states)
        found = first + share_b * (second - first) + share_c * (third - first)
        if name not in learned:
            stack = torch.stack([first, second, third])
            found = found.clamp(stack.amin(0), stack.amax(0))
        mixed[name] = found.to(tensor.dtype)
    return mixed


def _axis(low: float, high: float, points: int, margin: float) -> tuple[float, ...]:
    room = margin * (high - low)
    start, end = low - room, high + room
    return tuple(start + (end - start) * index / (points - 1) for index in range(points))
