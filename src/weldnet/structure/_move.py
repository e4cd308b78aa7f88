"""The only code that moves units: carry a tensor along maps of the spaces that lie in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weldnet.structure._spec import Indices, Layout, Place, Structure

__all__ = ["carry", "move", "renumber", "unit_rows"]

#: How one space moves. An integer vector ``source`` of length m: new unit u is old unit source[u]. A matrix of
#: shape (old, new): new unit u is the sum of the old units, weighted by column u.
UnitMap = Tensor


def renumber(
    state: Mapping[str, Tensor], structure: Structure, sources: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Renumber a whole state dict: new unit ``u`` of a space is its old unit ``sources[space][u]``.

    Args:
        state: tensors by name; not changed.
        structure: where the units lie.
        sources: an integer vector of shape (units,) for each space to renumber; spaces left out stay.

    Returns:
        A new dict with the same keys, dtypes and devices. Tensors without a place are the same objects.
    """
    out = {name: move(tensor, structure, _maps(structure.places_in(name), sources)) for name, tensor in state.items()}
    for alias, name in structure.aliases.items():
        if alias in out and name in out:
            out[alias] = out[name]
    return out


def carry(
    tensor: Tensor, structure: Structure, place: Place, maps: Mapping[str, UnitMap]
) -> Tensor:
    """Move every axis of ``tensor`` except those of ``place``, so that units there can be compared.

    Spaces without an entry in ``maps`` stay as they are.
    """
    others = [p for p in structure.places_in(place.tensor) if p.axes != place.axes or p.view != place.view]
    return move(tensor, structure, _maps(others, maps), keep=place)


def unit_rows(tensor: Tensor, structure: Structure, place: Place) -> Tensor:
    """Unfold ``tensor`` along ``place``: one row a unit, shape (units, copies x everything else)."""
    positions = torch.as_tensor(structure.positions(place), device=tensor.device)
    units, copies = positions.shape
    flat = _axes_first(tensor, place)
    if place.layout == Layout() and units == flat.shape[0]:
        return flat
    return flat[positions.reshape(-1)].reshape(units, copies * flat.shape[1])


def move(
    tensor: Tensor,
    structure: Structure,
    maps: Sequence[tuple[Place, UnitMap]],
    *,
    keep: Place | None = None,
) -> Tensor:
    """Carry one tensor along the given maps, axis by axis.

    Where one axis depends on another (a grouped convolution), all axes move at once and the maps must be integer
    vectors. ``keep`` then names the place whose own axes stay.
    """
    view = next((p.view for p, _ in maps if p.view is not None), keep.view if keep is not None else None)
    if view is not None:
        return _move_jointly(tensor, structure, maps, view, keep)
    for place, unit_map in maps:
        axis, positions = place.axes[0], structure.positions(place)
        if unit_map.dtype == torch.int64:
            index = np.arange(tensor.shape[axis])
            index[positions] = positions[unit_map.cpu().numpy()]
            tensor = tensor.index_select(axis, torch.as_tensor(index, device=tensor.device))
        else:
            tensor = _mix(tensor, axis, positions, unit_map)
    return tensor


def _maps(places: Sequence[Place], maps: Mapping[str, UnitMap]) -> list[tuple[Place, UnitMap]]:
    return [(place, maps[place.space]) for place in places if place.space in maps]


def _axes_first(tensor: Tensor, place: Place) -> Tensor:
    seen = tensor if place.view is None else tensor.reshape(place.view)
    rest = [a for a in range(seen.dim()) if a not in place.axes]
    extent = math.prod(seen.shape[a] for a in place.axes)
    return seen.permute(*place.axes, *rest).reshape(extent, -1)


def _mix(tensor: Tensor, axis: int, positions: Indices, matrix: Tensor) -> Tensor:
    """Replace the units along ``axis`` by weighted sums of units, copy by copy."""
    units, copies = positions.shape
    order = positions.reshape(-1)
    in_order = order.size == tensor.shape[axis] and bool((order == np.arange(order.size)).all())
    if in_order and axis == tensor.dim() - 1 and copies == 1:
        return tensor @ matrix
    front = tensor.movedim(axis, 0)
    index = torch.as_tensor(order, device=tensor.device)
    rows = front if in_order else front[index]
    mixed = (matrix.T @ rows.reshape(units, -1)).reshape(order.size, *front.shape[1:])
    if not in_order:
        mixed = front.index_copy(0, index, mixed)
    return mixed.movedim(0, axis)


def _move_jointly(
    tensor: Tensor,
    structure: Structure,
    maps: Sequence[tuple[Place, UnitMap]],
    view: tuple[int, ...],
    keep: Place | None,
) -> Tensor:
    seen = tensor.reshape(view)
    index = [np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(view))]) for axis, size in enumerate(view)]
    kept = () if keep is None else _axes_in_view(tensor, keep, view)
    joint: dict[tuple[int, ...], Indices] = {}
    for place, source in maps:
        axes, positions = _axes_in_view(tensor, place, view), structure.positions(place)
        whole = joint.setdefault(axes, np.arange(math.prod(view[a] for a in axes)))
        whole[positions] = positions[source.cpu().numpy()]
    for axes, whole in joint.items():
        sizes = [view[a] for a in axes]
        parts = np.unravel_index(whole.reshape(sizes), sizes)
        shape = [view[a] if a in axes else 1 for a in range(len(view))]
        for axis, part in zip(axes, _undo_kept(parts, axes, kept), strict=True):
            if axis not in kept:
                index[axis] = part.reshape(shape)
    moved = seen[tuple(torch.as_tensor(i, device=tensor.device) for i in np.broadcast_arrays(*index))]
    return moved.reshape(tensor.shape)


def _undo_kept(parts: Sequence[Indices], axes: tuple[int, ...], kept: tuple[int, ...]) -> Sequence[Indices]:
    """Let the blocks stay where the kept place has them; only what is inside the blocks moves."""
    shared = [i for i, axis in enumerate(axes) if axis in kept]
    for i in shared:
        blocks = np.moveaxis(parts[i], i, 0).reshape(parts[i].shape[i], -1)[:, 0]
        parts = [np.take(part, np.argsort(blocks), axis=i) for part in parts]
    return parts


def _axes_in_view(tensor: Tensor, place: Place, view: tuple[int, ...]) -> tuple[int, ...]:
    """Name a plain place's axis by the axes of a view that splits axes of the tensor."""
    if place.view is not None:
        return place.axes
    axis = place.axes[0]
    before, through = math.prod(tensor.shape[:axis]), math.prod(tensor.shape[: axis + 1])
    ends = [math.prod(view[:i]) for i in range(len(view) + 1)]
    first = max(i for i, end in enumerate(ends) if end == before and i < len(view))
    return tuple(range(first, next(i for i in range(first + 1, len(ends)) if ends[i] == through)))
