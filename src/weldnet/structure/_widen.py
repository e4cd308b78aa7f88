"""Widen: bring networks into a universe of more units, where some of them lie side by side instead of on one another.

Every network k has its units at ``targets`` in each wider space. With S_i the networks that own the index i of the axes
that write units, and T_j those of the axes that read them,

    W[i, j] = sum_(k in S_i and T_j) share_k W_k[i_k, j_k] / sum_(k in S_i) share_k

so that a unit of one network reads from that network's units only, and a unit of several from all of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weldnet.structure._spec import Indices, Place, Structure

__all__ = ["Wider", "used_entries", "widened", "wider_shape"]


@dataclass(frozen=True)
class Wider:
    """Where the units of networks lie in wider spaces.

    Args:
        structure: of every network; the spaces to widen are no nested ones, and their places are plain axes that are
            either written or read.
        targets: for each widened space one row a network, shape (networks, units): the universe unit of each unit.
        units: of each widened space.
    """

    structure: Structure
    targets: Mapping[str, Tensor]
    units: Mapping[str, int]

    @property
    def networks(self) -> int:
        """How many networks there are."""
        return len(next(iter(self.targets.values()), ()))


@dataclass(frozen=True)
class _WiderAxis:
    """One axis: the old index of every network at every new one, shape (networks, new extent); -1 where it has none."""

    axis: int
    reads: bool
    sources: Tensor

    @property
    def owned(self) -> Tensor:
        return self.sources >= 0


def wider_shape(name: str, wider: Wider) -> tuple[int, ...]:
    """Return the shape of a tensor in the wider universe."""
    shape = list(wider.structure.shapes[wider.structure.aliases.get(name, name)])
    for axis in _axes(name, wider):
        shape[axis.axis] = axis.sources.shape[1]
    return tuple(shape)


def widened(name: str, tensors: Sequence[Tensor], wider: Wider, shares: Sequence[float]) -> Tensor:
    """Bring one tensor of all networks into the wider universe and average it there, in float64 (or complex128).

    Args:
        name: of the tensor.
        tensors: one a network, floating or complex, of the structure's shape; not changed.
        wider: where the units lie.
        shares: of the networks, summing to 1.

    Returns:
        One tensor of :func:`wider_shape`, of the first one's dtype and on its device.
    """
    first, axes = tensors[0], _axes(name, wider)
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(wider_shape(name, wider), dtype=wide, device=first.device)
    present = torch.zeros([1] * total.dim(), dtype=torch.float64, device=first.device)
    for k, (tensor, share) in enumerate(zip(tensors, shares, strict=True)):
        placed = tensor.detach().to(first.device, wide)
        here = torch.full_like(present, share)
        for axis in axes:
            sources, owned = axis.sources[k].to(first.device), _along(axis.owned[k], axis.axis, total.dim())
            placed = placed.index_select(axis.axis, sources.clamp_min(0)) * owned.to(placed)
            here = here if axis.reads else here * owned.to(here)
        total += share * placed
        present = present + here
    return (total / torch.where(present > 0, present, torch.ones_like(present))).to(first.dtype)


def used_entries(name: str, wider: Wider) -> int:
    """Count the entries of a widened tensor that are not 0 just because they lie between units kept apart."""
    axes = _axes(name, wider)
    rest = math.prod(n for i, n in enumerate(wider_shape(name, wider)) if i not in {a.axis for a in axes})
    masks, counts = np.array([2**wider.networks - 1]), np.array([rest])
    for axis in axes:
        owners = (axis.owned.numpy() * (1 << np.arange(wider.networks))[:, None]).sum(0)
        kinds, sizes = np.unique(owners, return_counts=True)
        masks = (masks[:, None] & kinds).ravel()
        counts = (counts[:, None] * sizes).ravel()
    return int(counts[masks != 0].sum())


def _along(owned: Tensor, axis: int, rank: int) -> Tensor:
    return owned.reshape([-1 if a == axis else 1 for a in range(rank)])


def _axes(name: str, wider: Wider) -> list[_WiderAxis]:
    name = wider.structure.aliases.get(name, name)
    found: dict[int, list[Place]] = {}
    for place in wider.structure.places_in(name):
        if place.space in wider.targets:
            found.setdefault(place.axes[0], []).append(place)
    return [
        _WiderAxis(axis, places[0].role == "reads", _sources(places, wider.structure.shapes[name][axis], wider))
        for axis, places in found.items()
    ]


def _sources(places: Sequence[Place], extent: int, wider: Wider) -> Tensor:
    kept, new = _stretch(places, extent, wider)
    length = extent + sum(len(ends) * ends.shape[1] - wider.structure.positions(p).size for p, ends in new.items())
    sources = np.full((wider.networks, length), -1, np.int64)
    free = np.ones(extent, bool)
    for place, ends in new.items():
        positions = wider.structure.positions(place)
        free[positions] = False
        for k, target in enumerate(wider.targets[place.space].numpy()):
            sources[k, ends[target]] = positions
    sources[:, kept[free]] = np.flatnonzero(free)
    return torch.from_numpy(sources)


def _stretch(places: Sequence[Place], extent: int, wider: Wider) -> tuple[Indices, dict[Place, Indices]]:
    """Make room on an axis: new units come right behind the last unit of their space.

    Returns:
        The new index of every old one, shape (extent,), and of every unit of each place, (units, copies).
    """
    behind: dict[int, list[tuple[Place, int, int]]] = {}
    for place in places:
        positions = wider.structure.positions(place)
        for group in _runs(positions[-1]):
            extra = [(place, unit, c) for unit in range(len(positions), wider.units[place.space]) for c in group]
            behind.setdefault(int(positions[-1, group[-1]]), []).extend(extra)
    kept = np.empty(extent, np.int64)
    new = {p: np.empty((wider.units[p.space], wider.structure.positions(p).shape[1]), np.int64) for p in places}
    at = 0
    for old in range(extent):
        kept[old] = at
        at += 1
        for place, unit, copy in behind.get(old, ()):
            new[place][unit, copy] = at
            at += 1
    for place in places:
        positions = wider.structure.positions(place)
        new[place][: len(positions)] = kept[positions]
    return kept, new


def _runs(last: Indices) -> list[list[int]]:
    """Group the copies of the last unit that lie beside one another, in their order on the axis."""
    order = np.argsort(last)
    breaks = np.flatnonzero(np.diff(last[order]) != 1) + 1
    return [group.tolist() for group in np.split(order, breaks)]
