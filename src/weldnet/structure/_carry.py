"""Carry: float tensors of several networks along hard or soft maps of the spaces that lie in them.

Where the meaning of an axis depends on a block (the inputs of a grouped convolution depend on the group), several axes
of a tensor's view share the axis that counts the blocks. With P the map of the blocks, and Q[a, u] what happens inside
when block a goes to block u, ``W'_u = sum_a P[a, u] Q_out[a, u]^T W_a Q_in[a, u]``: the block's weight enters once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weldnet.errors import StructureError
from weldnet.structure._move import axes_in_view, is_whole, unit_rows
from weldnet.structure._spec import Indices, Place, Space, Structure

__all__ = ["Maps", "block_space", "carried", "carried_rows", "partners"]


@dataclass(frozen=True)
class Maps:
    """How the spaces of several networks move, stacked over the networks.

    Args:
        whole: for each space integer sources (networks, new), new unit u being old unit source[u]; or matrices
            (networks, old, new), new unit u being the old units weighted by column u.
        inner: for each nested space what happens inside when the parent's unit a becomes unit u: integer sources
            (networks, a, u, new) or matrices (networks, a, u, old, new), counted within the blocks.
    """

    whole: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    inner: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def carried(stack: Tensor, structure: Structure, tensor: str, maps: Maps) -> Tensor:
    """Carry a stack of tensors, one a network, on every axis.

    Args:
        stack: shape (networks, ...): the same float tensor of every network.
        structure: where the units lie.
        tensor: its name.
        maps: spaces left out stay.

    Returns:
        The same shape.
    """
    seen, clusters = _see(stack, structure, tensor)
    for cluster in clusters:
        seen = _carry_cluster(seen, structure, cluster, maps)
    return seen.reshape(stack.shape)


def carried_rows(stack: Tensor, structure: Structure, place: Place, maps: Maps) -> Tensor:
    """Carry a stack of tensors on every axis but ``place``'s, and unfold them along it.

    Args:
        stack: shape (networks, ...): the same float tensor of every network.
        structure: where the units lie.
        place: the place whose units are to be compared; it stays as it is.
        maps: spaces left out stay.

    Returns:
        Shape (networks, units, copies x everything else). Where the place has :func:`partners`, the other axes arrive
        in another way for every block that a unit could go to: (networks, blocks, units, copies x everything else),
        with as many blocks as :func:`block_space` has units.
    """
    places = structure.places_in(place.tensor)
    if any(p.view is not None for p in places):
        return _rows_in_view(stack, structure, place, maps)
    for other in places:
        if other.axes != place.axes and other.space in maps.whole:
            stack = _carry_axis(stack, other.axes[0] + 1, structure.positions(other), maps.whole[other.space])
    front = stack.movedim(place.axes[0] + 1, 1).flatten(2) if stack.dim() > 2 else stack.unsqueeze(-1)
    positions = structure.positions(place)
    if not is_whole(positions, front.shape[1]):
        front = front.index_select(1, torch.as_tensor(positions.reshape(-1), device=stack.device))
    return front.reshape(len(stack), positions.shape[0], -1)


def partners(structure: Structure, place: Place) -> tuple[Place, ...]:
    """Return the places of the same tensor whose axes depend on the same blocks as this place's."""
    _, clusters = _sides(structure, place.tensor)
    own = next(cluster for cluster in clusters if any(place in side for side in cluster.values()))
    return tuple(p for side in own.values() if place not in side for p in side)


def block_space(structure: Structure, place: Place) -> Space | None:
    """Return the space whose units are the blocks on which a place with :func:`partners` depends.

    It is the place's own space or one that it is nested in; None if the whole space lies in one block.
    """
    view, clusters = _sides(structure, place.tensor)
    own = next(cluster for cluster in clusters if any(place in side for side in cluster.values()))
    return _Parts.of(structure, place, view, _shared_axis(place.tensor, own)).space


# -- the sides of a tensor -------------------------------------------------------------------------

#: The places of a tensor by the axes of its view on which they lie.
Cluster = dict[tuple[int, ...], list[Place]]


def _view(structure: Structure, tensor: str) -> tuple[int, ...]:
    shape = structure.shapes[structure.aliases.get(tensor, tensor)]
    return next((p.view for p in structure.places_in(tensor) if p.view is not None), tuple(shape))


def _axes(structure: Structure, place: Place, view: Sequence[int]) -> tuple[int, ...]:
    return axes_in_view(structure.shapes[place.tensor], place, tuple(view))


def _sides(structure: Structure, tensor: str) -> tuple[tuple[int, ...], list[Cluster]]:
    """Group the places of a tensor by their axes, and those by which share an axis."""
    view = _view(structure, tensor)
    clusters: list[Cluster] = []
    for place in structure.places_in(tensor):
        axes = _axes(structure, place, view)
        touching = [c for c in clusters if any(set(axes) & set(other) for other in c)]
        merged: Cluster = {other: places for c in touching for other, places in c.items()}
        merged.setdefault(axes, []).append(place)
        first = clusters.index(touching[0]) if touching else len(clusters)
        clusters[first : first + 1] = [merged]
        clusters = [c for c in clusters if not any(c is t for t in touching[1:])]
    return view, clusters


def _see(stack: Tensor, structure: Structure, tensor: str) -> tuple[Tensor, list[Cluster]]:
    view, clusters = _sides(structure, tensor)
    return stack.reshape(len(stack), *view), clusters


def _shared_axis(tensor: str, cluster: Cluster) -> int:
    shared = set.intersection(*(set(axes) for axes in cluster))
    rest = [axis for axes in cluster for axis in axes if axis not in shared]
    if len(shared) != 1 or len(set(rest)) != len(rest):
        raise StructureError(
            f"{tensor!r}: the axes {', '.join(map(str, cluster))} depend on one another in more than one way; "
            "only axes that share one axis of blocks can be carried"
        )
    return shared.pop()


# -- axes that depend on nothing -------------------------------------------------------------------


def _carry_cluster(seen: Tensor, structure: Structure, cluster: Cluster, maps: Maps) -> Tensor:
    moved = {axes: [p for p in places if p.space in maps.whole] for axes, places in cluster.items()}
    if not any(moved.values()):
        return seen
    if len(cluster) == 1:
        ((axes, places),) = moved.items()
        for place in places:
            seen = _carry_axes(seen, axes, structure.positions(place), maps.whole[place.space])
        return seen
    return _carry_together(seen, structure, cluster, maps)


def _carry_axes(seen: Tensor, axes: tuple[int, ...], positions: Indices, maps: Tensor) -> Tensor:
    if len(axes) == 1:
        return _carry_axis(seen, axes[0] + 1, positions, maps)
    front = seen.movedim([a + 1 for a in axes], list(range(1, len(axes) + 1)))
    flat = _carry_axis(front.flatten(1, len(axes)), 1, positions, maps)
    return flat.reshape(front.shape).movedim(list(range(1, len(axes) + 1)), [a + 1 for a in axes])


def _carry_axis(stack: Tensor, axis: int, positions: Indices, maps: Tensor) -> Tensor:
    """Carry one axis of every tensor of a stack along its own map, copy by copy."""
    front = stack.movedim(axis, 1)
    index = torch.as_tensor(positions, device=stack.device)
    if maps.dtype == torch.int64:
        source = torch.arange(front.shape[1], device=stack.device).repeat(len(stack), 1)
        source[:, index.reshape(-1)] = index[maps].flatten(1)
        return front[torch.arange(len(stack), device=stack.device)[:, None], source].movedim(1, axis)
    whole = is_whole(positions, front.shape[1])
    rows = front if whole else front[:, index.reshape(-1)]
    mixed = maps.transpose(1, 2) @ rows.reshape(len(stack), len(positions), -1)
    mixed = mixed.reshape(rows.shape)
    if not whole:
        mixed = front.index_copy(1, index.reshape(-1), mixed)
    return mixed.movedim(1, axis)


# -- axes that depend on blocks --------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Where a place's units lie, seen as blocks on a shared axis and positions on the rest of its axes.

    Args:
        space: whose units are the blocks; None if all units lie in one.
        block: index on the shared axis, shape (blocks, copies).
        rest: index on the other axes taken together, shape (blocks, units of a block, copies).
        width: extent of the other axes taken together.
    """

    space: Space | None
    block: Indices
    rest: Indices
    width: int

    @staticmethod
    def of(structure: Structure, place: Place, view: tuple[int, ...], shared: int) -> _Parts:
        axes = _axes(structure, place, view)
        positions = structure.positions(place)
        sizes = [view[a] for a in axes]
        index = dict(zip(axes, np.unravel_index(positions, sizes), strict=True))
        others = [a for a in axes if a != shared]
        widths = [view[a] for a in others]
        rest = (
            np.ravel_multi_index([index[a] for a in others], widths) if others else np.zeros(positions.shape, np.int64)
        )
        space, count = _block_of(structure, structure.space(place.space), index[shared])
        block = index[shared].reshape(count, -1, positions.shape[1])[:, 0]
        return _Parts(space, block, rest.reshape(count, -1, positions.shape[1]), math.prod(widths))


def _block_of(structure: Structure, space: Space, shared: Indices) -> tuple[Space | None, int]:
    """Climb to the space whose units stand for the indices on the shared axis; return it and their number."""
    if (shared == shared[0]).all():
        return None, 1
    found = space
    while found.parent is not None:
        above = structure.space(found.parent)
        blocks = shared.reshape(above.size, -1, shared.shape[1])
        if not (blocks == blocks[:, :1]).all():
            break
        found = above
    return found, found.size


def _carry_together(seen: Tensor, structure: Structure, cluster: Cluster, maps: Maps) -> Tensor:
    tensor = next(iter(cluster.values()))[0].tensor
    view, shared = tuple(seen.shape[1:]), _shared_axis(tensor, cluster)
    mixed = _mixed(seen, structure, cluster, maps, shared, keep=None)
    weights = _block_weights(seen, structure, cluster, maps, view, shared)
    out = torch.einsum("kau,kau...->ku...", weights, mixed.expand(*mixed.shape[:2], weights.shape[2], *mixed.shape[3:]))
    return out.movedim(1, shared + 1)


def _rows_in_view(stack: Tensor, structure: Structure, place: Place, maps: Maps) -> Tensor:
    seen, clusters = _see(stack, structure, place.tensor)
    own = next(cluster for cluster in clusters if any(place in side for side in cluster.values()))
    for cluster in clusters:
        if cluster is not own:
            seen = _carry_cluster(seen, structure, cluster, maps)
    if len(own) > 1:
        return _rows_by_block(seen, structure, place, own, maps)
    return torch.stack([unit_rows(tensor, structure, place) for tensor in seen.reshape(stack.shape)])


def _rows_by_block(seen: Tensor, structure: Structure, place: Place, cluster: Cluster, maps: Maps) -> Tensor:
    view, shared = tuple(seen.shape[1:]), _shared_axis(place.tensor, cluster)
    kept = _axes(structure, place, view)
    mixed = _mixed(seen, structure, cluster, maps, shared, keep=kept)
    blocks = view[shared]
    mixed = mixed.expand(*mixed.shape[:2], blocks, *mixed.shape[3:])
    own = [_behind(axis, shared) for axis in kept if axis != shared]
    mixed = mixed.movedim(own, list(range(3, 3 + len(own)))) if own else mixed
    parts = _Parts.of(structure, place, view, shared)
    mixed = mixed.reshape(*mixed.shape[:3], parts.width, -1)
    count, block, copies = parts.rest.shape
    at, rest = (torch.as_tensor(i, device=seen.device) for i in (parts.block, parts.rest.reshape(1, -1, copies)))
    old = at.repeat_interleave(block, 0)[None]  # (1, units, copies)
    new = at[:, None, :]  # (blocks, 1, copies)
    rows = mixed[:, old, new, rest]
    return rows.reshape(len(seen), count, count * block, -1)


def _behind(axis: int, shared: int) -> int:
    """Where an axis of the view is once networks, old blocks and new blocks stand in front."""
    return axis + 3 - (1 if axis > shared else 0)


def _mixed(
    seen: Tensor, structure: Structure, cluster: Cluster, maps: Maps, shared: int, keep: tuple[int, ...] | None
) -> Tensor:
    """Carry what lies inside the blocks, for every pair: shape (networks, old, new or 1, the other axes)."""
    view = tuple(seen.shape[1:])
    mixed = seen.movedim(shared + 1, 1).unsqueeze(2)
    for axes, places in cluster.items():
        others = [axis for axis in axes if axis != shared]
        if axes == keep or not others or not any(p.space in maps.inner or p.space in maps.whole for p in places):
            continue
        back = [_behind(axis, shared) for axis in others]
        last = list(range(-len(back), 0))
        moved = mixed.movedim(back, last)
        inside = _inside(seen, structure, places, maps, view, shared)
        flat = moved.reshape(*moved.shape[:3], -1, inside.shape[-1]) @ inside
        mixed = flat.reshape(*flat.shape[:3], *moved.shape[3:]).movedim(last, back)
    return mixed


def _inside(
    seen: Tensor, structure: Structure, places: Sequence[Place], maps: Maps, view: tuple[int, ...], shared: int
) -> Tensor:
    """The maps inside every pair of blocks on one side, shape (networks, old block, new block, old, new)."""
    blocks, device = view[shared], seen.device
    width = _Parts.of(structure, places[0], view, shared).width
    free = np.ones((blocks, width), bool)
    inside = seen.new_zeros(len(seen), blocks, blocks, width, width)
    for place in places:
        parts = _Parts.of(structure, place, view, shared)
        known = _relative(structure, structure.space(place.space), parts.space, maps, seen)
        for copy in range(parts.rest.shape[-1]):
            block, rest = parts.block[:, copy], parts.rest[:, :, copy]
            free[block[:, None], rest] = False
            b, r = torch.as_tensor(block, device=device), torch.as_tensor(rest, device=device)
            inside[:, b[:, None, None, None], b[None, :, None, None], r[:, None, :, None], r[None, :, None, :]] = known
    stay = torch.as_tensor(free[:, None] & free[None, :], dtype=seen.dtype, device=device)
    return inside + torch.diag_embed(stay)


def _relative(structure: Structure, space: Space, above: Space | None, maps: Maps, like: Tensor) -> Tensor:
    """A space's map given where its ancestor's units a go (u), shape (networks, a, u, old, new)."""
    if above is None:
        return _dense(_whole(space, maps, like), space.size, like)[:, None, None]
    if space == above:
        return like.new_ones(len(like), space.size, space.size, 1, 1)
    if space.name in maps.inner:
        inner = _dense(maps.inner[space.name], space.block, like)
    else:
        eye = torch.eye(space.block, dtype=like.dtype, device=like.device)
        blocks = space.size // space.block
        inner = eye.expand(len(like), blocks, blocks, -1, -1)
    assert space.parent is not None
    parent = structure.space(space.parent)
    if parent == above:
        return inner
    upper = _relative(structure, parent, above, maps, like)
    networks, count, _, units, _ = upper.shape
    inner = inner.reshape(networks, count, units, count, units, space.block, space.block).permute(0, 1, 3, 2, 5, 4, 6)
    both = upper[:, :, :, :, None, :, None] * inner
    return both.reshape(networks, count, count, units * space.block, units * space.block)


def _whole(space: Space, maps: Maps, like: Tensor) -> Tensor:
    if space.name in maps.whole:
        return maps.whole[space.name]
    return torch.arange(space.size, device=like.device).expand(len(like), -1)


def _dense(maps: Tensor, size: int, like: Tensor) -> Tensor:
    """See integer sources (..., new) as matrices (..., old, new)."""
    if maps.dtype != torch.int64:
        return maps
    return torch.nn.functional.one_hot(maps, size).transpose(-1, -2).to(like)


def _block_weights(
    seen: Tensor, structure: Structure, cluster: Cluster, maps: Maps, view: tuple[int, ...], shared: int
) -> Tensor:
    """The map of the blocks, shape (networks, old block, new block)."""
    weights = torch.eye(view[shared], dtype=seen.dtype, device=seen.device).repeat(len(seen), 1, 1)
    for place in (place for places in cluster.values() for place in places):
        parts = _Parts.of(structure, place, view, shared)
        if parts.space is None:
            continue
        whole = _dense(_whole(parts.space, maps, seen), parts.space.size, seen)
        for block in (
            torch.as_tensor(parts.block[:, copy], device=seen.device) for copy in range(parts.block.shape[1])
        ):
            weights[:, block[:, None], block[None, :]] = whole
    return weights
