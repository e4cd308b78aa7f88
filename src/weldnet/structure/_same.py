"""Whether two structures allow the same renumberings, however they name, order and lay out their spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from weldnet.structure._move import move
from weldnet.structure._spec import Indices, Place, Structure

__all__ = ["same_group"]

#: The old unit at every new one, for each space.
Sources = Mapping[str, Indices]


def same_group(a: Structure, b: Structure, *, seed: int = 0) -> bool:
    """Tell whether two structures of one model allow the same renumberings.

    Their groups must be of one size, and renumberings of either one (units turned by one, the first two swapped, a
    random order) must be renumberings of the other. Names, views, and the order of spaces, units, places and copies
    do not matter.

    Args:
        a: one structure.
        b: another one of the same model.
        seed: of the random orders.

    Example:
        >>> import torch, weldnet
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x = torch.zeros(1, 4)
        >>> same_group(weldnet.capture(net, x), weldnet.capture(net, x, route="export"))
        True
    """
    if dict(a.shapes) != dict(b.shapes) or not math.isclose(a.log10_renumberings, b.log10_renumberings, rel_tol=1e-9):
        return False
    random = np.random.default_rng(seed)
    orders = [lambda n: np.roll(np.arange(n), 1), _swap, random.permutation]
    return all(_allows(other, one, _renumbering(one, order)) for one, other in ((a, b), (b, a)) for order in orders)


def _swap(size: int) -> Indices:
    return np.r_[np.arange(size)[:2][::-1], np.arange(2, size)]


def _renumbering(structure: Structure, order: Callable[[int], Indices]) -> Sources:
    """Reorder every space, and what is nested inside every block, by ``order``."""
    sources: dict[str, Indices] = {}
    for space in structure.spaces:
        if space.parent is None:
            sources[space.name] = order(space.size)
        else:
            blocks = sources[space.parent].tolist()
            sources[space.name] = np.concatenate([b * space.block + order(space.block) for b in blocks])
    return sources


def _allows(structure: Structure, other: Structure, sources: Sources) -> bool:
    """Whether a renumbering of ``other`` is one of ``structure`` too."""
    joint = {name: _jointly(name, structure, other) for name in structure.shapes}
    moved = {name: _moved(other, name, sources, joint[name]) for name in structure.shapes}
    found: dict[str, Indices] = {}
    for place in structure.places:
        source = _read(structure, place, moved[place.tensor], joint[place.tensor])
        if source is None or not np.array_equal(found.setdefault(place.space, source), source):
            return False
    for space in reversed(structure.spaces):  # what has no place of its own moves as its blocks do
        if space.parent is not None and space.parent not in found:
            found[space.parent] = found[space.name][:: space.block] // space.block
    return _is_renumbering(structure, found) and all(
        np.array_equal(before, after)
        for name, whole in moved.items()
        for before, after in zip(whole, _moved(structure, name, found, joint[name]), strict=True)
    )


def _is_renumbering(structure: Structure, sources: Sources) -> bool:
    for space in structure.spaces:
        source = sources[space.name]
        if not np.array_equal(np.sort(source), np.arange(space.size)):
            return False
        if space.parent is not None and (source // space.block != sources[space.parent].repeat(space.block)).any():
            return False
    return True


def _jointly(tensor: str, *structures: Structure) -> bool:
    """Whether an axis of a tensor depends on another one; else its axes can be looked at one by one."""
    return any(place.view is not None for s in structures for place in s.places_in(tensor))


def _moved(structure: Structure, tensor: str, sources: Sources, joint: bool) -> list[Indices]:
    """Return the old position at every new one: for each axis, or over all elements."""
    places, shape = structure.places_in(tensor), structure.shapes[tensor]
    if joint:
        numbered = torch.arange(math.prod(shape)).reshape(shape)
        return [move(numbered, structure, [(p, torch.from_numpy(sources[p.space])) for p in places]).numpy()]
    return [
        _axis(structure, size, [p for p in places if p.axes == (axis,)], sources) for axis, size in enumerate(shape)
    ]


def _axis(structure: Structure, size: int, places: Iterable[Place], sources: Sources) -> Indices:
    index = np.arange(size)
    for place in places:
        positions = structure.positions(place)
        index[positions] = positions[sources[place.space]]
    return index


def _read(structure: Structure, place: Place, moved: list[Indices], joint: bool) -> Indices | None:
    """Return the source of a place's space that explains where its positions went; None if there is none."""
    shape = structure.shapes[place.tensor]
    if not joint:
        origin = moved[place.axes[0]]
    else:
        seen = place.view or shape
        corner = moved[0].reshape(seen)[tuple(slice(None) if a in place.axes else 0 for a in range(len(seen)))]
        index = np.unravel_index(corner.ravel(), seen)
        origin = np.ravel_multi_index([index[a] for a in place.axes], [seen[a] for a in place.axes])
    positions = structure.positions(place)
    owner = np.full(place.extent(shape), -1)
    owner[positions] = np.arange(len(positions))[:, None]
    source = owner[origin[positions[:, 0]]]
    return None if (source < 0).any() else source
