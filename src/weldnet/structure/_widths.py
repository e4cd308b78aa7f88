"""Widths: do structures of one architecture correspond, and how tensors go from one width to another.

A soft map from m units to n is two matrices of shape (m, n). Where a tensor writes units, a new unit is the mean of old
ones: columns of ``means`` sum to 1. Where a tensor reads them, what it reads from an old unit is split over new ones:
rows of ``splits`` sum to 1. If each new unit stands for equal old ones, or the other way round, the function stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weldnet.errors import AlignmentError, WidthError
from weldnet.structure._move import is_whole
from weldnet.structure._spec import Place, Structure

__all__ = ["Shares", "blend", "require_correspondence"]


@final
@dataclass(frozen=True)
class Shares:
    """How the units of one flat space go to another width.

    Args:
        means: shape (units, new units); for tensors that write the units.
        splits: the same shape; for tensors that read them.
    """

    means: Tensor
    splits: Tensor


def require_correspondence(a: Structure, b: Structure, names: tuple[str, str] = ("a", "b")) -> None:
    """Require that two structures differ in the sizes of flat spaces only, one place for one place.

    Args:
        a: one structure.
        b: another one.
        names: of the networks that they are of, for messages.

    Raises:
        AlignmentError: the structures have other spaces, places or tensors, or what differs in size is no space; the
            message names the first.
        WidthError: what differs in size is nested, or the pixels of a unit; the message names it and both sizes.
    """
    if dict(a.shapes) == dict(b.shapes) and a.spaces == b.spaces and a.places == b.places:
        return
    ours, theirs = names
    for what, left, right in (
        ("space", [s.name for s in a.spaces], [s.name for s in b.spaces]),
        ("tensor", list(a.shapes), list(b.shapes)),
        ("place", [_where(p) for p in a.places], [_where(p) for p in b.places]),
    ):
        if left != right:
            odd = next((x for x in left if x not in right), None) or next((x for x in right if x not in left), left[0])
            raise AlignmentError(
                f"structures of {ours!r} and {theirs!r} do not correspond: the {what} {odd!r} is not in both, or in "
                "another order; networks of other widths must be of one architecture"
            )
    for one, other in zip(a.spaces, b.spaces, strict=True):
        nested = one.parent is not None or bool(a.children(one.name))
        if (nested and one != other) or (one.parent, bool(a.children(one.name))) != (
            other.parent,
            bool(b.children(other.name)),
        ):
            raise WidthError(
                f"space {one.name!r} has {one.size} units in {ours!r} and {other.size} in {theirs!r}, in blocks; only "
                "spaces without blocks may differ in width: train or load networks with equal groups and heads"
            )
    for one, other in zip(a.places, b.places, strict=True):
        _check_places(a, b, one, other, names)
    for tensor, shape in a.shapes.items():
        _check_rest(a, b, tensor, shape, names)


def blend(tensor: Tensor, structure: Structure, name: str, target: Structure, shares: Mapping[str, Shares]) -> Tensor:
    """Carry one float tensor along soft maps of flat spaces.

    Args:
        tensor: of the network that ``structure`` is of.
        structure: where its units lie.
        name: of the tensor.
        target: where they are to lie, see :func:`require_correspondence`.
        shares: by space. An axis with none of these spaces stays as it is.

    Raises:
        WidthError: the tensor both reads and writes units whose width changes.
    """
    ends = dict(zip(structure.places, target.places, strict=True))
    places = [place for place in structure.places_in(name) if place.space in shares]
    for axis in dict.fromkeys(place.axes for place in places):
        pairs = [(place, ends[place]) for place in places if place.axes == axis]
        if any(place.view is not None for place, _ in pairs):
            raise WidthError(
                f"space {pairs[0][0].space!r}: the axes of {name} depend on blocks, so that it goes only along "
                "permutations"
            )
        tensor = _blend_axis(tensor, structure, target, pairs, shares)
    return tensor


def _blend_axis(
    tensor: Tensor,
    structure: Structure,
    target: Structure,
    pairs: list[tuple[Place, Place]],
    shares: Mapping[str, Shares],
) -> Tensor:
    axis = pairs[0][0].axes[0]
    front = tensor.movedim(axis, 0)
    old = [torch.as_tensor(structure.positions(place), device=tensor.device) for place, _ in pairs]
    new = [torch.as_tensor(target.positions(end), device=tensor.device) for _, end in pairs]
    length = target.shapes[pairs[0][1].tensor][axis]
    stay_old, stay_new = _others(old, front.shape[0]), _others(new, length)
    out = front.new_zeros(length, *front.shape[1:])
    if len(stay_old):
        out[stay_new] = front[stay_old]
    for (place, _), source, goal in zip(pairs, old, new, strict=True):
        matrix = _matrix(shares[place.space], place).to(front)
        rows = front if is_whole(structure.positions(place), len(front)) else front[source.reshape(-1)]
        mixed = matrix.T @ rows.reshape(len(source), -1)
        out[goal.reshape(-1)] = mixed.reshape(-1, *front.shape[1:])
    return out.movedim(0, axis)


def _matrix(shares: Shares, place: Place) -> Tensor:
    if place.role != "both":
        return shares.splits if place.role == "reads" else shares.means
    if shares.means.shape[0] != shares.means.shape[1]:
        raise WidthError(
            f"space {place.space!r}: {place.tensor} both writes and reads its units (it is tied), so that it has no "
            f"counterpart of {shares.means.shape[1]} units instead of {shares.means.shape[0]}; use equal widths"
        )
    return (shares.means * shares.splits).sqrt()


def _others(taken: list[Tensor], length: int) -> Tensor:
    free = torch.ones(length, dtype=torch.bool, device=taken[0].device)
    for positions in taken:
        free[positions.reshape(-1)] = False
    return free.nonzero()[:, 0]


# -- what must agree ---------------------------------------------------------------------------------


def _where(place: Place) -> tuple[object, ...]:
    return place.tensor, place.space, place.axes, place.role, place.view is None


def _check_places(a: Structure, b: Structure, one: Place, other: Place, names: tuple[str, str]) -> None:
    left, right = a.positions(one).shape, b.positions(other).shape
    if left[1] != right[1] or (left[0] != right[0] and one.view is not None):
        raise WidthError(
            f"space {one.space!r}: each unit has {left[1]} positions on axis {one.axes[0]} of {one.tensor} in "
            f"{names[0]!r}, {right[1]} in {names[1]!r}; networks of other widths must agree in everything else"
        )


def _check_rest(a: Structure, b: Structure, tensor: str, shape: tuple[int, ...], names: tuple[str, str]) -> None:
    """Positions that lie in no space must be as many."""
    other = b.shapes[tensor]
    free = [list(s) for s in (shape, other)]
    for structure, rest in ((a, free[0]), (b, free[1])):
        for place in structure.places_in(tensor):
            if place.view is None and place.axes[0] < len(rest):
                rest[place.axes[0]] -= structure.positions(place).size
    if len(shape) != len(other) or free[0] != free[1]:
        raise AlignmentError(
            f"{tensor} has shape {shape} in {names[0]!r} and {other} in {names[1]!r}, and they differ in more than the "
            "widths of spaces; networks of other widths must agree in inputs, outputs, kernels and what is frozen"
        )
