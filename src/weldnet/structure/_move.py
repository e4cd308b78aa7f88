"""Renumber: carry tensors of any type along integer maps of the spaces that lie in them, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weldnet.structure._spec import Indices, Place, Structure

__all__ = ["axes_in_view", "is_whole", "move", "renumber", "unit_rows"]

#: Bytes that stay in a processor's cache between two passes.
_PIECE = 1 << 20

#: How one space moves: an integer vector ``source``; new unit u is old unit source[u].
UnitMap = Tensor


def renumber(state: Mapping[str, Tensor], structure: Structure, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def unit_rows(tensor: Tensor, structure: Structure, place: Place) -> Tensor:
    """Unfold ``tensor`` along ``place``: one row a unit, shape (units, copies x everything else)."""
    positions = structure.positions(place)
    flat = _axes_first(tensor, place)
    if not is_whole(positions, flat.shape[0]):
        flat = flat[torch.as_tensor(positions.reshape(-1), device=tensor.device)]
    return flat.reshape(positions.shape[0], -1)


def move(tensor: Tensor, structure: Structure, maps: Sequence[tuple[Place, UnitMap]]) -> Tensor:
    """Carry one tensor along integer maps, axis by axis; all at once where one axis depends on another."""
    view = next((place.view for place, _ in maps if place.view is not None), None)
    if view is not None:
        return _move_jointly(tensor, structure, maps, view)
    axes: dict[int, Tensor] = {}
    for place, source in maps:
        axis, positions = place.axes[0], structure.positions(place)
        if is_whole(positions, tensor.shape[axis]) and positions.shape[1] == 1:
            axes[axis] = source.to(tensor.device)
            continue
        if axis not in axes:
            axes[axis] = torch.arange(tensor.shape[axis], device=tensor.device)
        units = torch.as_tensor(positions, device=tensor.device)
        axes[axis][units] = units[source.to(tensor.device)]
    return _select(tensor, axes)


def _select(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Pick along one axis after the other; along the first axis and another one in pieces that stay in the cache."""
    others = [axis for axis in axes if axis != 0]
    whole = tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.requires_grad
    if not whole or 0 not in axes or len(others) != 1:
        for axis, index in axes.items():
            tensor = tensor.index_select(axis, index)
        return tensor
    out = torch.empty_like(tensor)
    rows = max(1, _PIECE // max(1, tensor[0].nbytes))
    for first in range(0, len(tensor), rows):
        piece = tensor.index_select(0, axes[0][first : first + rows])
        torch.index_select(piece, others[0], axes[others[0]], out=out[first : first + rows])
    return out


def _maps(places: Sequence[Place], maps: Mapping[str, UnitMap]) -> list[tuple[Place, UnitMap]]:
    return [(place, maps[place.space]) for place in places if place.space in maps]


def _axes_first(tensor: Tensor, place: Place) -> Tensor:
    seen = tensor if place.view is None else tensor.reshape(place.view)
    rest = [a for a in range(seen.dim()) if a not in place.axes]
    extent = math.prod(seen.shape[a] for a in place.axes)
    return seen.permute(*place.axes, *rest).reshape(extent, -1)


def is_whole(positions: Indices, extent: int) -> bool:
    """Whether the positions are the whole axis in its own order."""
    return positions.size == extent and bool((positions.reshape(-1) == np.arange(extent)).all())


def _move_jointly(
    tensor: Tensor, structure: Structure, maps: Sequence[tuple[Place, UnitMap]], view: tuple[int, ...]
) -> Tensor:
    seen = tensor.reshape(view)
    index = [
        np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(view))]) for axis, size in enumerate(view)
    ]
    joint: dict[tuple[int, ...], Indices] = {}
    for place, source in maps:
        axes, positions = axes_in_view(tensor.shape, place, view), structure.positions(place)
        whole = joint.setdefault(axes, np.arange(math.prod(view[a] for a in axes)))
        whole[positions] = positions[source.cpu().numpy()]
    for axes, whole in joint.items():
        sizes = [view[a] for a in axes]
        parts = np.unravel_index(whole.reshape(sizes), sizes)
        shape = [view[a] if a in axes else 1 for a in range(len(view))]
        for axis, part in zip(axes, parts, strict=True):
            index[axis] = part.reshape(shape)
    moved = seen[tuple(torch.as_tensor(i, device=tensor.device) for i in np.broadcast_arrays(*index))]
    return moved.reshape(tensor.shape)


def axes_in_view(shape: Sequence[int], place: Place, view: tuple[int, ...]) -> tuple[int, ...]:
    """Name a plain place's axis by the axes of a view that splits axes of the tensor."""
    if place.view is not None:
        return place.axes
    axis = place.axes[0]
    before, through = math.prod(shape[:axis]), math.prod(shape[: axis + 1])
    ends = [math.prod(view[:i]) for i in range(len(view) + 1)]
    first = max(i for i, end in enumerate(ends) if end == before and i < len(view))
    return tuple(range(first, next(i for i in range(first + 1, len(ends)) if ends[i] == through)))
