"""Bricks: a tensor cut so that carrying it and comparing its units are plain matrix products, without copies between.

A brick has units of one space on its first axis, units of another one (or nothing) on its last, and everything else in
between: shape (left, middle, right). Seen as (left, middle x right) or as (left x middle, right) it is a matrix either
way: ``U^T B`` carries its left side, ``B U`` its right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from weldnet.structure._move import is_whole
from weldnet.structure._spec import Indices, Place, Structure

__all__ = ["Brick", "as_stored", "bricks_of"]


@final
@dataclass(frozen=True, eq=False)
class Brick:
    """One part of a tensor.

    Args:
        tensor: its name.
        left: the place whose units its first axis counts.
        right: the place whose units its last axis counts; None if nothing else in it can be carried.
        axes: of the tensor, that of the left side and that of the right one (None if there is only one).
        picked: for each of these axes the positions that the brick has, shape (units, copies); None if that is the
            whole axis in its own order, one position a unit.
    """

    tensor: str
    left: Place
    right: Place | None
    axes: tuple[int, int | None]
    picked: tuple[Indices | None, Indices | None]

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the part, of shape (left, middle, right): a view where the memory's order allows, else a copy."""
        (first, last), (ours, theirs) = self.axes, self.picked
        if last is None:
            part = _picked(tensor, first, ours)
            return part.movedim(first, 0).reshape(_units(ours, part.shape[first]), -1, 1)
        part = _picked(_picked(tensor, first, ours), last, theirs)
        units = _units(ours, part.shape[first]), _units(theirs, part.shape[last])
        copies = part.shape[first] // units[0], part.shape[last] // units[1]
        front = part.movedim((first, last), (0, 1)).unflatten(1, (units[1], copies[1])).unflatten(0, (units[0], -1))
        # (left, its copies, right, its copies, the rest) -> (left, middle, right)
        ordered = front.permute(0, 1, 3, *range(4, front.dim()), 2)
        right = units[1] if self.right is not None else 1
        return ordered.reshape(units[0], -1, right)

    def other(self, place: Place) -> Place | None:
        """Return the place on the side away from ``place``."""
        return self.right if place is self.left else self.left


def bricks_of(structure: Structure, tensor: str) -> tuple[Brick, ...] | None:
    """Cut a tensor into bricks; together they hold every position that lies in a space.

    Returns:
        None where axes depend on one another, or spaces lie on more than two axes: such a tensor has no bricks.
    """
    places, shape = structure.places_in(tensor), structure.shapes[tensor]
    sides = {axis: [p for p in places if p.axes == (axis,)] for axis in sorted({p.axes[0] for p in places})}
    if any(p.view is not None for p in places) or len(sides) > 2:
        return None
    parts = {axis: _parts(structure, found, shape[axis]) for axis, found in sides.items()}
    if len(parts) == 1:
        ((axis, only),) = parts.items()
        return tuple(Brick(tensor, p, None, (axis, None), (index, None)) for p, index in only if p is not None)
    (first, ours), (last, theirs) = parts.items()
    found: list[Brick] = []
    for left, one in ours:
        for right, other in theirs:
            if left is not None:
                found.append(Brick(tensor, left, right, (first, last), (one, other)))
            elif right is not None:
                found.append(Brick(tensor, right, None, (last, first), (other, one)))
    return tuple(found)


def as_stored(structure: Structure, tensor: str, stack: Tensor) -> Tensor:
    """Return a stack of tensors (networks, ...), equal to ``stack``, whose bricks are views if they can be."""
    bricks = bricks_of(structure, tensor) or ()
    whole = next((brick for brick in bricks if all(index is None for index in brick.picked)), None)
    if whole is None or whole.axes[1] is None or stack.dim() < 4:
        return stack
    first, last = whole.axes[0], whole.axes[1]
    rest = [axis for axis in range(stack.dim() - 1) if axis not in (first, last)]
    order = [0, *(axis + 1 for axis in (first, *rest, last))]
    back = [order.index(axis) for axis in range(stack.dim())]
    return stack.permute(order).contiguous().permute(back)


#: A place with its positions, or the positions of an axis that lie in no space.
_Part = tuple[Place | None, Indices | None]


def _parts(structure: Structure, places: list[Place], extent: int) -> list[_Part]:
    if len(places) == 1:
        positions = structure.positions(places[0])
        if positions.shape[1] == 1 and is_whole(positions, extent):
            return [(places[0], None)]
    found: list[_Part] = [(place, structure.positions(place)) for place in places]
    taken = np.concatenate([structure.positions(place).reshape(-1) for place in places])
    free = np.setdiff1d(np.arange(extent), taken)
    return [*found, (None, free[:, None])] if free.size else found


def _picked(tensor: Tensor, axis: int, index: Indices | None) -> Tensor:
    if index is None or is_whole(index, tensor.shape[axis]):
        return tensor
    return tensor.index_select(axis, torch.as_tensor(index.reshape(-1), device=tensor.device))


def _units(index: Indices | None, extent: int) -> int:
    return extent if index is None else len(index)
