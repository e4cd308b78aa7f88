"""Units and what ties them: the algebra that operations push through a network.

A *unit* is an abstract neuron. Every index of every axis (size > 1) of every parameter and buffer starts as its
own unit. Operations then say what must be renumbered together: equal units are *united*; units that must move
together without being equal are *related*, u -> v with a label that is unique to the event; units that may not
move are *pinned*, with a reason. A *factor* says which unit each (joint) index of some axes of a tensor is; *tags*
tell copies of one unit apart, as the pixels of a channel after flattening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Factor", "Relation", "Units", "Value", "broadcast", "combine", "join_factors", "move_data", "reduce"]

Ints = NDArray[np.int64]

INPUT = "network input"


@dataclass(frozen=True)
class Factor:
    """Some axes of a tensor, and the unit of each joint index over them.

    ``units`` and ``tags`` have the sizes of ``axes``, which are in rising order.
    """

    axes: tuple[int, ...]
    units: Ints
    tags: Ints | None = None

    def moved(self, axes: Sequence[int]) -> Factor:
        """Return the same factor with its axes renamed."""
        order = np.argsort(axes)
        tags = None if self.tags is None else self.tags.transpose(order)
        return Factor(tuple(int(axes[i]) for i in order), self.units.transpose(order), tags)


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: its shape, factors, and the axes along which it is constant.

    An axis of size > 1 that is neither is *positional*: its indices may not move.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    uniform: frozenset[int] = frozenset()
    tensor: str | None = None  # the parameter that this is, unchanged
    why: str = INPUT  # why its positional axes may not move

    def positional(self, axis: int) -> bool:
        """Whether the indices of this axis may not move."""
        if self.shape[axis] <= 1 or axis in self.uniform:
            return False
        return not any(axis in f.axes for f in self.factors)


@dataclass(frozen=True)
class Relation:
    """``source[i]`` must move with ``target[i]``; ``label`` is one number, or one for each pair."""

    source: Ints
    target: Ints
    label: Ints


class Units:
    """All units of one model: union-find with birth records, relations, and pins."""

    def __init__(self) -> None:
        self.root: Ints = np.empty(0, np.int64)
        self.origin: Ints = np.empty(0, np.int64)
        self.relations: list[Relation] = []
        self.pins: list[tuple[Ints, str]] = []
        self._births = 0
        self._labels = 0
        self._sets: list[frozenset[int]] = []
        self._set_ids: dict[frozenset[int], int] = {}
        self._set_of: Ints = np.empty(0, np.int64)  # by root: which events its members come from

    def fresh(self, *shape: int) -> Ints:
        """Give birth to new units of one event."""
        count = int(np.prod(shape, dtype=np.int64))
        new = np.arange(len(self.root), len(self.root) + count)
        self.root = np.concatenate([self.root, new])
        self.origin = np.concatenate([self.origin, np.full(count, self._births)])
        own = self._set_id(frozenset([self._births]))
        self._set_of = np.concatenate([self._set_of, np.full(count, own)])
        self._births += 1
        return new.reshape(shape)

    def pin(self, units: Ints, reason: str) -> None:
        """Forbid these units to move."""
        if units.size:
            self.pins.append((units.ravel(), reason))

    def relate(self, source: Ints, target: Ints, *tags: Ints | None) -> None:
        """Relate units pair by pair; pairs with different tags get different labels.

        So do pairs of different birth: should their units be united later, they still play different roles.
        """
        codes = np.zeros(source.size, np.int64)
        for tag in (self.origin[source], self.origin[target], *tags):
            if tag is not None:
                _, inverse = np.unique(tag.ravel(), return_inverse=True)
                codes = codes * (int(inverse.max(initial=0)) + 1) + inverse.ravel()
        _, codes = np.unique(codes, return_inverse=True)
        triple = np.unique(np.stack([codes.ravel(), source.ravel(), target.ravel()]), axis=1)
        self.relations.append(Relation(triple[1], triple[2], triple[0] + self._labels))
        self._labels += int(codes.max(initial=0)) + 1

    def unite(self, a: Ints, b: Ints) -> bool:
        """Make units equal pair by pair, unless that would merge two units born together; say whether it did."""
        pairs = np.unique(np.stack([self.root[a.ravel()], self.root[b.ravel()]]), axis=1)
        left, right = pairs[:, pairs[0] != pairs[1]]
        if not left.size:
            return True
        both = np.concatenate([left, right])
        if len(np.unique(both)) != both.size:
            return False  # not one to one
        sets = np.unique(np.stack([self._set_of[left], self._set_of[right]]), axis=1)
        merged: dict[tuple[int, int], int] = {}
        for s, t in sets.T.tolist():
            if self._sets[s] & self._sets[t]:
                return False
            merged[s, t] = self._set_id(self._sets[s] | self._sets[t])
        new_sets = np.array([merged[s, t] for s, t in zip(self._set_of[left], self._set_of[right], strict=True)])
        keep, gone = np.minimum(left, right), np.maximum(left, right)
        self._set_of[keep] = new_sets
        step = np.arange(len(self.root))
        step[gone] = keep
        self.root = step[self.root]
        return True

    def distinct(self, factor: Factor) -> bool:
        """Whether every index of the factor is another unit, without tags."""
        return factor.tags is None and len(np.unique(self.root[factor.units])) == factor.units.size

    def _set_id(self, members: frozenset[int]) -> int:
        if members not in self._set_ids:
            self._set_ids[members] = len(self._sets)
            self._sets.append(members)
        return self._set_ids[members]


# -- the four moves that every rule is made of -----------------------------------------------------


def broadcast(value: Value, shape: tuple[int, ...]) -> Value:
    """Align a value to a broadcast shape; new and stretched axes are uniform."""
    shift = len(shape) - len(value.shape)
    factors = tuple(f.moved([a + shift for a in f.axes]) for f in value.factors)
    uniform = {a + shift for a in value.uniform} | set(range(shift))
    uniform |= {a + shift for a, n in enumerate(value.shape) if n == 1}
    return Value(shape, factors, frozenset(a for a in uniform if shape[a] > 1), why=value.why)


def combine(units: Units, operands: Iterable[Value], shape: tuple[int, ...]) -> Value:
    """Combine values index by index: pointwise operations, and the front half of every contraction.

    A unit whose axis meets indices that cannot move is pinned, with the other value's reason.
    """
    aligned = [broadcast(v, shape) for v in operands]
    factors = join_factors(units, [f for v in aligned for f in v.factors])
    for value in aligned:
        fixed = [a for a in range(len(shape)) if value.positional(a)]
        for factor in factors:
            _meet_positions(units, factor, [a for a in fixed if a in factor.axes], value.why)
    uniform = frozenset(a for a in range(len(shape)) if shape[a] > 1 and all(a in v.uniform for v in aligned))
    return Value(shape, factors, uniform, why=weakest(aligned))


def weakest(values: Iterable[Value]) -> str:
    """Return the reason of the values' positional axes that says most about what weldnet cannot see."""
    reasons = [v.why for v in values if any(v.positional(a) for a in range(len(v.shape)))]
    return next((r for r in reasons if r != INPUT), INPUT)


def join_factors(units: Units, factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Tie factors of one tensor that share axes: the same axes are one factor afterwards."""
    joined: list[Factor] = []
    for new in factors:
        current: Factor | None = new
        kept: list[Factor] = []
        for old in joined:
            if current is None or not set(old.axes) & set(current.axes):
                kept.append(old)
                continue
            first, current = _tie(units, old, current)
            if first is not None:
                kept.append(first)
        joined = kept if current is None else [*kept, current]
    return tuple(joined)


def reduce(units: Units, value: Value, axes: Iterable[int]) -> Value:
    """Reduce over axes symmetrically (sum, mean, max, ...); they stay with size 1."""
    gone = set(axes)
    shape = tuple(1 if a in gone else n for a, n in enumerate(value.shape))
    kept: list[Factor] = []
    for factor in value.factors:
        rest = [i for i, a in enumerate(factor.axes) if a not in gone]
        if len(rest) == len(factor.axes):
            kept.append(factor)
            continue
        blocks = units.fresh(*(factor.units.shape[i] for i in rest))
        spread = [n if i in rest else 1 for i, n in enumerate(factor.units.shape)]
        target = np.broadcast_to(blocks.reshape(spread), factor.units.shape)
        units.relate(factor.units, target, factor.tags)
        if rest:
            kept.append(Factor(tuple(factor.axes[i] for i in rest), blocks))
    return Value(shape, join_factors(units, kept), value.uniform - gone, why=value.why)


def move_data(units: Units, operands: Sequence[Value], sources: Ints) -> Value:
    """Look every output element up at its source.

    Args:
        units: the units of the model.
        operands: the inputs of a data movement.
        sources: for every output element its place in the concatenation of the flattened inputs, or -1 where
            the operation fills in a constant.
    """
    shape = sources.shape
    varying: dict[tuple[int, ...], list[Factor]] = {}
    moving: set[int] = set()
    start = 0
    for value in operands:
        size = int(np.prod(value.shape, dtype=np.int64))
        inside = (sources >= start) & (sources < start + size)
        local = np.where(inside, sources - start, 0)
        start += size
        index = np.unravel_index(local, value.shape) if value.shape else ()
        for factor in value.factors:
            found = _look_up(units, factor, value, index, inside)
            if found is not None:
                varying.setdefault(found.axes, []).append(found)
        steady = [a for a in range(len(value.shape)) if value.shape[a] > 1 and a not in value.uniform]
        for axis in range(len(shape)):
            if shape[axis] > 1 and (
                any(_varies(np.where(inside, index[a], -1), axis) for a in steady) or _varies(inside, axis)
            ):
                moving.add(axis)
    why = weakest(operands)
    factors = [f for axes, group in varying.items() for f in _merge_parts(units, group, sources, axes, operands, why)]
    uniform = frozenset(a for a, n in enumerate(shape) if n > 1 and a not in moving)
    return Value(shape, join_factors(units, factors), uniform, why=why)


# -- helpers ---------------------------------------------------------------------------------------


def _tie(units: Units, old: Factor, new: Factor) -> tuple[Factor | None, Factor | None]:
    """Tie two factors; return what is left of each. The new one may still overlap further factors."""
    if old.axes == new.axes:
        same_tags = (old.tags is None and new.tags is None) or (
            old.tags is not None and new.tags is not None and np.array_equal(old.tags, new.tags)
        )
        if same_tags and units.unite(old.units, new.units):
            return old, None
        if units.distinct(new):
            units.relate(new.units, old.units, old.tags)
            return new, None
        if units.distinct(old):
            units.relate(old.units, new.units, new.tags)
            return old, None
        both = units.fresh(*old.units.shape)
        units.relate(both, old.units, old.tags)
        units.relate(both, new.units, new.tags)
        return Factor(old.axes, both), None
    if set(old.axes) < set(new.axes):
        _relate_blocks(units, new, old)
        return None, new
    if set(new.axes) < set(old.axes):
        _relate_blocks(units, old, new)
        return old, None
    common = [a for a in old.axes if a in new.axes]
    sizes = [old.units.shape[old.axes.index(a)] for a in common]
    blocks = Factor(tuple(common), units.fresh(*sizes))
    _relate_blocks(units, old, blocks)
    _relate_blocks(units, new, blocks)
    return old, new


def _relate_blocks(units: Units, fine: Factor, coarse: Factor) -> None:
    """Relate every index of a factor to the unit of a factor on fewer axes."""
    shape = [n if a in coarse.axes else 1 for a, n in zip(fine.axes, fine.units.shape, strict=True)]
    target = np.broadcast_to(coarse.units.reshape(shape), fine.units.shape)
    tags = None if coarse.tags is None else np.broadcast_to(coarse.tags.reshape(shape), fine.units.shape)
    units.relate(fine.units, target, fine.tags, tags)


def _meet_positions(units: Units, factor: Factor, axes: Sequence[int], reason: str) -> None:
    """Keep what a factor's unit is along positional axes; across the other axes it may still move."""
    if not axes:
        return
    if len(axes) == len(factor.axes):
        units.pin(factor.units, reason)
        return
    shape = [n if a in axes else 1 for a, n in zip(factor.axes, factor.units.shape, strict=True)]
    slots = units.fresh(*(n for a, n in zip(factor.axes, factor.units.shape, strict=True) if a in axes))
    units.pin(slots, reason)
    units.relate(factor.units, np.broadcast_to(slots.reshape(shape), factor.units.shape), factor.tags)


def _varies(array: NDArray[np.generic], axis: int) -> bool:
    first = array.take([0], axis=axis)
    return bool((array != first).any())


def _look_up(
    units: Units, factor: Factor, value: Value, index: Sequence[Ints], inside: NDArray[np.bool_]
) -> Factor | None:
    """Find a factor's units in the output of a data movement; -1 where the output comes from elsewhere."""
    where = tuple(index[a] for a in factor.axes)
    found = np.where(inside, factor.units[where], -1)
    axes = tuple(a for a in range(found.ndim) if found.shape[a] > 1 and _varies(found, a))
    _mark_part(units, factor, [w[inside] for w in where])
    if not axes:
        return None
    corner = tuple(slice(None) if a in axes else 0 for a in range(found.ndim))
    chosen = found[corner]
    real = chosen[chosen >= 0]
    others = [a for a in range(len(value.shape)) if a not in factor.axes]
    if len(np.unique(real)) == real.size:
        result = Factor(axes, chosen)
        walked = [index[a][corner][chosen >= 0] for a in others if value.positional(a)]
        if any(len(np.unique(positions)) > 1 for positions in walked):
            units.pin(real, value.why)  # a diagonal: each unit is seen at a position of its own
        return result
    # Copies of one unit: tell them apart by where they come from on the source's other axes, then by their order.
    tags = np.zeros(chosen.shape, np.int64) if factor.tags is None else factor.tags[where][corner]
    for axis in others:
        tags = tags * value.shape[axis] + index[axis][corner]
    return Factor(axes, chosen, _numbered(chosen, tags))


def _numbered(chosen: Ints, tags: Ints) -> Ints:
    """Tell apart what has the same unit and the same tag, by its order."""
    _, inverse = np.unique(np.stack([chosen.ravel(), tags.ravel()]), axis=1, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    place = np.arange(len(order))
    first = np.r_[True, np.diff(inverse.ravel()[order]) != 0]
    count = np.empty(len(order), np.int64)
    count[order] = place - np.maximum.accumulate(np.where(first, place, 0))
    count[chosen.ravel() < 0] = 0
    return tags * (int(count.max(initial=0)) + 1) + count.reshape(chosen.shape)


def _mark_part(units: Units, factor: Factor, where: Sequence[Ints]) -> None:
    """Tell units that were picked from the rest: what happens to them alone must show if the parts meet again."""
    picked = np.zeros(factor.units.shape, bool)
    picked[tuple(where)] = True
    if picked.any() and not picked.all():
        chosen = factor.units[picked]
        tags = None if factor.tags is None else factor.tags[picked]
        units.relate(chosen, np.repeat(units.fresh(1), chosen.size), tags)


def _merge_parts(
    units: Units, group: Sequence[Factor], sources: Ints, axes: tuple[int, ...], operands: Sequence[Value], why: str
) -> list[Factor]:
    """Merge the parts that different inputs bring to the same axes, and give the rest units of its own."""
    merged: list[Factor] = []
    for part in group:
        for i, whole in enumerate(merged):
            if not ((whole.units >= 0) & (part.units >= 0)).any():
                merged[i] = _merge_two(whole, part, number=i + 1)
                break
        else:
            merged.append(part)
    return [_fill_gaps(units, whole, sources, axes, operands, why) for whole in merged]


def _merge_two(whole: Factor, part: Factor, number: int) -> Factor:
    here = part.units >= 0
    chosen = np.where(here, part.units, whole.units)
    real = chosen[chosen >= 0]
    if whole.tags is None and part.tags is None and len(np.unique(real)) == real.size:
        return Factor(whole.axes, chosen)
    none = np.zeros(chosen.shape, np.int64)
    old, new = (none if f.tags is None else f.tags for f in (whole, part))
    top = int(max(old.max(initial=0), new.max(initial=0))) + 1
    return Factor(whole.axes, chosen, np.where(here, new + top * number, old))


def _fill_gaps(
    units: Units, whole: Factor, sources: Ints, axes: tuple[int, ...], operands: Sequence[Value], why: str
) -> Factor:
    gaps = whole.units < 0
    if not gaps.any():
        return whole
    chosen = whole.units.copy()
    corner = tuple(slice(None) if a in axes else 0 for a in range(sources.ndim))
    missing = sources[corner][gaps]
    new = np.empty(missing.shape, np.int64)
    for inside, constant in _origins(operands, missing):
        new[inside] = units.fresh(int(inside.sum()))  # different inputs hold different constants
        if not constant:
            units.pin(new[inside], f"joined with {why}")
    chosen[gaps] = new
    return Factor(axes, chosen, whole.tags)


def _origins(operands: Sequence[Value], sources: Ints) -> list[tuple[NDArray[np.bool_], bool]]:
    """Which elements come from the fill and from each input, and whether it is constant along every axis."""
    found = [(sources < 0, True)]
    start = 0
    for value in operands:
        size = int(np.prod(value.shape, dtype=np.int64))
        flat = not value.factors and all(n == 1 or a in value.uniform for a, n in enumerate(value.shape))
        found.append(((sources >= start) & (sources < start + size), flat))
        start += size
    return [(inside, constant) for inside, constant in found if inside.any()]
