"""The only code that moves units: carry a tensor along maps of the spaces that lie in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weldnet.structure._spec import Indices, Place, Structure

__all__ = ["carried_rows", "move", "renumber", "unit_rows"]

#: How one space moves. An integer vector ``source`` of length m: new unit u is old unit source[u]. A matrix of
#: shape (old, new): new unit u is the sum of the old units, weighted by column u.
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


def carried_rows(stack: Tensor, structure: Structure, place: Place, maps: Mapping[str, UnitMap]) -> Tensor:
    """Carry a stack of tensors, one a network, on every axis but ``place``'s, and unfold them along it.

    Args:
        stack: shape (networks, ...): the same tensor of every network.
        structure: where the units lie.
        place: the place whose units are to be compared; it stays as it is.
        maps: for each space a stack of integer sources (networks, units) or of matrices (networks, old, new).

    Returns:
        Shape (networks, units, copies x everything else).
    """
    others = [p for p in structure.places_in(place.tensor) if p.axes != place.axes or p.view != place.view]
    if place.view is not None or any(p.view is not None for p in others):
        one_by_one = [
            move(tensor, structure, [(p, maps[p.space][k]) for p in others if p.space in maps], keep=place)
            for k, tensor in enumerate(stack)
        ]
        return torch.stack([unit_rows(tensor, structure, place) for tensor in one_by_one])
    for other in others:
        if other.space in maps:
            stack = _carry_axis(stack, other.axes[0] + 1, structure.positions(other), maps[other.space])
    front = stack.movedim(place.axes[0] + 1, 1).flatten(2) if stack.dim() > 2 else stack.unsqueeze(-1)
    positions = structure.positions(place)
    if not _is_whole(positions, front.shape[1]):
        front = front.index_select(1, torch.as_tensor(positions.reshape(-1), device=stack.device))
    return front.reshape(len(stack), positions.shape[0], -1)


def unit_rows(tensor: Tensor, structure: Structure, place: Place) -> Tensor:
    """Unfold ``tensor`` along ``place``: one row a unit, shape (units, copies x everything else)."""
    positions = structure.positions(place)
    flat = _axes_first(tensor, place)
    if not _is_whole(positions, flat.shape[0]):
        flat = flat[torch.as_tensor(positions.reshape(-1), device=tensor.device)]
    return flat.reshape(positions.shape[0], -1)


def move(
    tensor: Tensor, structure: Structure, maps: Sequence[tuple[Place, Tensor]], *, keep: Place | None = None
) -> Tensor:
    """Carry one tensor along integer maps, axis by axis.

    Where one axis depends on another (a grouped convolution) all axes move at once; ``keep`` then names the
    place whose own axes stay.
    """
    view = next((p.view for p, _ in maps if p.view is not None), keep.view if keep is not None else None)
    if view is not None:
        return _move_jointly(tensor, structure, maps, view, keep)
    for place, source in maps:
        axis, positions = place.axes[0], structure.positions(place)
        index = np.arange(tensor.shape[axis])
        index[positions] = positions[source.cpu().numpy()]
        tensor = tensor.index_select(axis, torch.as_tensor(index, device=tensor.device))
    return tensor


def _maps(places: Sequence[Place], maps: Mapping[str, UnitMap]) -> list[tuple[Place, UnitMap]]:
    return [(place, maps[place.space]) for place in places if place.space in maps]


def _axes_first(tensor: Tensor, place: Place) -> Tensor:
    seen = tensor if place.view is None else tensor.reshape(place.view)
    rest = [a for a in range(seen.dim()) if a not in place.axes]
    extent = math.prod(seen.shape[a] for a in place.axes)
    return seen.permute(*place.axes, *rest).reshape(extent, -1)


def _is_whole(positions: Indices, extent: int) -> bool:
    """Whether the positions are the whole axis in its own order."""
    return positions.size == extent and bool((positions.reshape(-1) == np.arange(extent)).all())


def _carry_axis(stack: Tensor, axis: int, positions: Indices, maps: UnitMap) -> Tensor:
    """Carry one axis of every tensor of a stack along its own map, copy by copy."""
    front = stack.movedim(axis, 1)
    index = torch.as_tensor(positions, device=stack.device)
    if maps.dtype == torch.int64:
        source = torch.arange(front.shape[1], device=stack.device).repeat(len(stack), 1)
        source[:, index.reshape(-1)] = index[maps].flatten(1)
        return front[torch.arange(len(stack), device=stack.device)[:, None], source].movedim(1, axis)
    whole = _is_whole(positions, front.shape[1])
    rows = front if whole else front[:, index.reshape(-1)]
    mixed = maps.transpose(1, 2) @ rows.reshape(len(stack), len(positions), -1)
    mixed = mixed.reshape(rows.shape)
    if not whole:
        mixed = front.index_copy(1, index.reshape(-1), mixed)
    return mixed.movedim(1, axis)


def _move_jointly(
    tensor: Tensor,
    structure: Structure,
    maps: Sequence[tuple[Place, UnitMap]],
    view: tuple[int, ...],
    keep: Place | None,
) -> Tensor:
    seen = tensor.reshape(view)
    index = [
        np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(view))]) for axis, size in enumerate(view)
    ]
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
