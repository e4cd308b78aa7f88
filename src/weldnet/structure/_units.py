"""Units and what ties them: the algebra that operations push through a network.

A *unit* is an abstract neuron. Every index of every axis (size > 1) of every parameter and buffer starts as its
own unit. Operations then say what must be renumbered together: equal units are *united*; units that must move
together without being equal are *related*, u -> v with a label that is unique to the event; units that may not
move are *pinned*, with a reason. A *factor* says which unit each (joint) index of some axes of a tensor is; *tags*
tell copies of one unit apart, as the pixels of a channel after flattening.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Factor",
    "Relation",
    "Units",
    "Value",
    "broadcast",
    "combine",
    "distinct_rows",
    "join_factors",
    "move_data",
    "reduce",
]

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
    leaf: tuple[str, tuple[int, ...]] | None = None  # the parameter that this is, and which of its axes are these
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
        self.relations: list[Relation] = []
        self.pins: list[tuple[Ints, str]] = []
        self._count = 0
        self._up: Ints = np.empty(1024, np.int64)  # towards the root; longer than there are units
        self._origin: Ints = np.empty(1024, np.int64)
        self._set_of: Ints = np.empty(1024, np.int64)  # by root: which events its members come from
        self._fixed = np.zeros(1024, bool)  # by root: whether it is pinned
        self._births = 0
        self._labels = 0
        self._sets: list[frozenset[int]] = []
        self._set_ids: dict[frozenset[int], int] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def root(self) -> Ints:
        """The root of every unit, shape (units,)."""
        return self.find(np.arange(self._count))

    @property
    def origin(self) -> Ints:
        """The event that gave birth to every unit, shape (units,)."""
        return self._origin[: self._count]

    def find(self, units: Ints) -> Ints:
        """Return the roots of these units."""
        found = self._up[units]
        while True:
            further = self._up[found]
            if np.array_equal(further, found):
                break
            found = further
        self._up[units] = found
        return found

    def fresh(self, *shape: int) -> Ints:
        """Give birth to new units of one event."""
        start = self._count
        self._count += int(np.prod(shape, dtype=np.int64))
        if self._count > len(self._up):
            more = 2 * self._count - len(self._up)
            self._up, self._origin, self._set_of = (
                np.concatenate([old, np.empty(more, np.int64)]) for old in (self._up, self._origin, self._set_of)
            )
            self._fixed = np.concatenate([self._fixed, np.zeros(more, bool)])
        new = np.arange(start, self._count)
        self._up[new] = new
        self._origin[new] = self._births
        self._set_of[new] = self._set_id(frozenset([self._births]))
        self._births += 1
        return new.reshape(shape)

    def pin(self, units: Ints, reason: str) -> None:
        """Forbid these units to move."""
        if units.size:
            self.pins.append((units.ravel(), reason))
            self._fixed[self.find(units)] = True

    def relate(self, source: Ints, target: Ints, *tags: Ints | None) -> None:
        """Relate units pair by pair; pairs with different tags get different labels.

        So do pairs of different birth: should their units be united later, they still play different roles.
        """
        codes = np.zeros(source.size, np.int64)
        for tag in (self._origin[source], self._origin[target], *tags):
            if tag is not None and tag.size and (tag.ravel() != tag.flat[0]).any():
                _, inverse = np.unique(tag.ravel(), return_inverse=True)
                codes = codes * (int(inverse.max(initial=0)) + 1) + inverse.ravel()
        if codes.any():
            _, codes = np.unique(codes, return_inverse=True)
        codes, source, target = distinct_rows(codes.ravel(), source.ravel(), target.ravel())
        self.relations.append(Relation(source, target, codes + self._labels))
        self._labels += int(codes.max(initial=0)) + 1

    def unite(self, a: Ints, b: Ints) -> bool:
        """Make units equal pair by pair, unless that would merge two units born together; say whether it did."""
        left, right = distinct_rows(self.find(a.ravel()), self.find(b.ravel()))
        differ = left != right
        left, right = left[differ], right[differ]
        if not left.size:
            return True
        both = np.concatenate([left, right])
        if len(np.unique(both)) != both.size:
            return False  # not one to one
        merged: dict[tuple[int, int], int] = {}
        for s, t in np.stack(distinct_rows(self._set_of[left], self._set_of[right]), 1).tolist():
            if self._sets[s] & self._sets[t]:
                return False
            merged[s, t] = self._set_id(self._sets[s] | self._sets[t])
        new_sets = np.array([merged[s, t] for s, t in zip(self._set_of[left], self._set_of[right], strict=True)])
        keep, gone = np.minimum(left, right), np.maximum(left, right)
        self._set_of[keep] = new_sets
        self._fixed[keep] |= self._fixed[gone]
        self._up[gone] = keep
        return True

    def unrelated(self, a: Ints, b: Ints) -> bool:
        """Whether no event gave birth to members of both sets of roots."""
        ours, theirs = (
            set[int]().union(*(self._sets[i] for i in set(self._set_of[roots].tolist()))) for roots in (a, b)
        )
        return not ours & theirs

    def held(self, factor: Factor) -> bool:
        """Whether all units of a factor are pinned: it then says no more than that its axes are positional."""
        return bool(self._fixed[self.find(factor.units)].all())

    def distinct(self, factor: Factor) -> bool:
        """Whether every index of the factor is another unit, without tags."""
        return factor.tags is None and len(np.unique(self.find(factor.units.ravel()))) == factor.units.size

    def _set_id(self, members: frozenset[int]) -> int:
        if members not in self._set_ids:
            self._set_ids[members] = len(self._sets)
            self._sets.append(members)
        return self._set_ids[members]


def distinct_rows(*columns: Ints) -> tuple[Ints, ...]:
    """Return the distinct rows of a table given by its columns, sorted by the first column, then the next."""
    order = np.lexsort(columns[::-1])
    rows = [column[order] for column in columns]
    if not order.size:
        return tuple(rows)
    new = np.zeros(len(order) - 1, bool)
    for row in rows:
        new |= row[1:] != row[:-1]
    keep = np.r_[True, new]
    return tuple(row[keep] for row in rows)


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
        positional = {a for a in range(len(shape)) if value.positional(a)}
        for factor in factors:
            _meet_positions(units, factor, positional, value.why)
    coarser = [f for v in aligned for f in v.factors]
    simple = tuple(_simplified(units, factor, coarser) for factor in factors)
    uniform = frozenset(a for a in range(len(shape)) if shape[a] > 1 and all(a in v.uniform for v in aligned))
    return Value(shape, simple, uniform, why=weakest(aligned))


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
        if units.held(factor):
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
    # Where the units of a factor cannot move, its axes are positional.
    operands = [replace(v, factors=tuple(f for f in v.factors if not units.held(f))) for v in operands]
    parts: list[_Part] = []
    moving: set[int] = set()
    start = 0
    constant = np.zeros(shape, bool)
    for inside, flat in _origins(operands, sources):
        constant |= inside & flat
    for value in operands:
        size = int(np.prod(value.shape, dtype=np.int64))
        if not size:
            continue
        inside = (sources >= start) & (sources < start + size)
        local = np.where(inside, sources - start, 0)
        start += size
        index = np.unravel_index(local, value.shape) if value.shape else ()
        parts += [_Part(factor, value, index, inside, constant) for factor in value.factors]
        steady = [a for a in range(len(value.shape)) if value.shape[a] > 1 and a not in value.uniform]
        for axis in range(len(shape)):
            if shape[axis] > 1 and (
                any(_varies(np.where(inside, index[a], -1), axis) for a in steady) or _varies(inside, axis)
            ):
                moving.add(axis)
    varying: dict[tuple[int, ...], list[Factor]] = {}
    parts, continued = _continue_parts(units, parts)
    for factor in continued:
        varying.setdefault(factor.axes, []).append(factor)
    _spread_parts(parts)
    for part in parts:
        found = part.look_up(units, [p for p in parts if p is not part and p.value is part.value])
        if found is not None:
            varying.setdefault(found.axes, []).append(found)
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


#: Up to this many different slices of a factor are compared with one another.
_SLICES = 8


def _simplified(units: Units, fine: Factor, operands: Sequence[Factor]) -> Factor:
    """Return an operand's factor on fewer axes if this one moves with it throughout, else the factor itself.

    As after joining a class token with patches: once the same vector is added to both, the channels of the token and
    those of the patches move with the vector's, and the positions along the other axes cannot move.
    """
    for coarse in operands:
        if set(coarse.axes) < set(fine.axes) and _follows(units, fine, coarse):
            _relate_blocks(units, fine, coarse)
            return coarse
    return fine


def _follows(units: Units, fine: Factor, coarse: Factor) -> bool:
    """Whether every slice of a factor is in step with a coarser factor, and no two slices can change places."""
    if not units.distinct(coarse):
        return False
    inside = [fine.axes.index(a) for a in coarse.axes]
    slices = np.moveaxis(fine.units, inside, range(len(inside))).reshape(coarse.units.size, -1)
    different = slices[:, np.r_[True, (slices[:, 1:] != slices[:, :-1]).any(0)]]
    if different.shape[1] > _SLICES * 4:
        return False
    different = np.unique(units.find(different), axis=1)
    if different.shape[1] > _SLICES or any(len(np.unique(column)) < len(column) for column in different.T):
        return False
    return all(units.unrelated(a, b) for a, b in itertools.combinations(different.T, 2))


def _relate_blocks(units: Units, fine: Factor, coarse: Factor) -> None:
    """Relate every index of a factor to the unit of a factor on fewer axes."""
    shape = [n if a in coarse.axes else 1 for a, n in zip(fine.axes, fine.units.shape, strict=True)]
    target = np.broadcast_to(coarse.units.reshape(shape), fine.units.shape)
    tags = None if coarse.tags is None else np.broadcast_to(coarse.tags.reshape(shape), fine.units.shape)
    units.relate(fine.units, target, fine.tags, tags)


def _meet_positions(units: Units, factor: Factor, positional: set[int], reason: str) -> None:
    """Keep what a factor's unit is along positional axes; across the other axes it may still move."""
    axes = [a for a in factor.axes if a in positional]
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


class _Part:
    """What a data movement takes from one factor of one input."""

    def __init__(
        self,
        factor: Factor,
        value: Value,
        index: Sequence[Ints],
        inside: NDArray[np.bool_],
        constant: NDArray[np.bool_],
    ) -> None:
        self.factor, self.value, self.index, self.inside = factor, value, index, inside
        self.where = tuple(index[a] for a in factor.axes)
        self.found = np.where(inside, factor.units[self.where], -1)  # -1 where the output comes from elsewhere
        self.axes = tuple(a for a, n in enumerate(self.found.shape) if n > 1 and _varies(self.found, a))
        self._seen: Ints | None = None  # where along the other axes to look, if not at their first index
        if self.axes and ((self.found < 0) <= constant).all():
            self._pass_over_constants()

    def look_up(self, units: Units, others_of_value: Sequence[_Part]) -> Factor | None:
        """Return the factor's units in the output, along the part's axes."""
        factor, value = self.factor, self.value
        _mark_part(units, factor, [w[self.inside] for w in self.where])
        if not self.axes:
            return None
        chosen = self._pick(self.found)
        real = chosen[chosen >= 0]
        others = [a for a in range(len(value.shape)) if a not in factor.axes]
        if len(np.unique(real)) == real.size:
            walked = [self._pick(self.index[a])[chosen >= 0] for a in others if value.positional(a)]
            if any(len(np.unique(positions)) > 1 for positions in walked):
                units.pin(real, value.why)  # a diagonal: each unit is seen at a position of its own
            return Factor(self.axes, chosen)
        # Copies of one unit: tell them apart by where they come from on the source's other axes, then by their order.
        # Where another factor comes along on the same axes, its units tell copies apart: their numbers may change.
        beside = [p for p in others_of_value if p.axes == self.axes and (p.found >= 0).all() and self.inside.all()]
        moved = {a for p in beside for a in p.factor.axes}
        tags = np.zeros(chosen.shape, np.int64) if factor.tags is None else self._pick(factor.tags[self.where])
        for axis in others:
            if axis not in moved:
                tags = tags * value.shape[axis] + self._pick(self.index[axis])
        return Factor(self.axes, chosen, _numbered(chosen, tags, *(self._pick(p.found) for p in beside)))

    def own_axes(self) -> tuple[int, ...]:
        """The axes along which the units vary inside the part."""
        high, low = np.where(self.inside, self.found, -1), np.where(self.inside, self.found, np.iinfo(np.int64).max)
        ends = [(high.max(a), low.min(a), self.inside.any(a)) for a in range(self.found.ndim)]
        return tuple(a for a, (top, bottom, here) in enumerate(ends) if (top != bottom)[here].any())

    def _pick(self, array: Ints) -> Ints:
        """Reduce an array over the output to the part's axes."""
        if self._seen is None:
            return array[tuple(slice(None) if a in self.axes else 0 for a in range(array.ndim))]
        return np.take_along_axis(_rest_last(array, self.axes), self._seen, -1)[..., 0]

    def _pass_over_constants(self) -> None:
        """Leave out axes along which only constants interrupt the units: a constant moves with any of them."""
        real = self.found >= 0
        high, low = (np.where(real, self.found, fill) for fill in (-1, np.iinfo(np.int64).max))
        kept = tuple(a for a in self.axes if (high.max(a) > low.min(a)).any())
        if not kept or kept == self.axes:
            return
        pattern = _rest_last(real, kept)
        if not (pattern == pattern.reshape(-1, pattern.shape[-1])[0]).all():
            return  # where the constants are tells units apart
        seen = np.argmax(pattern, -1)[..., None]
        found = _rest_last(self.found, kept)
        chosen = np.take_along_axis(found, seen, -1)
        if (chosen >= 0).all() and ((found < 0) | (found == chosen)).all():
            self.axes, self._seen = kept, seen


def _rest_last(array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    """Bring some axes to the front and make one of the others."""
    front = np.moveaxis(array, axes, range(len(axes)))
    return front.reshape(*front.shape[: len(axes)], -1)


def _continue_parts(units: Units, parts: list[_Part]) -> tuple[list[_Part], list[Factor]]:
    """Unite what continues from one input to the next along an axis on which units move, as columns of joined rows.

    Returns:
        The parts that are left, and the united factors.
    """
    groups: dict[tuple[int, ...], list[_Part]] = {}
    for part in parts:
        groups.setdefault(part.own_axes(), []).append(part)
    left, continued = list(parts), list[Factor]()
    for axes, group in groups.items():
        cover = sum(part.inside.astype(np.int64) for part in group)
        split = {a for part in group for a in range(part.found.ndim) if _varies(part.inside, a)}
        moving = any(split & set(other) for other in groups)
        if len(group) < 2 or not axes or not moving or split & set(axes) or (np.asarray(cover) != 1).any():
            continue
        if not all(units.distinct(part.factor) for part in group):
            continue
        gone = tuple(a for a in range(group[0].found.ndim) if a not in axes)
        rows = [part.found.max(gone) for part in group]
        if all(units.unite(rows[0], row) for row in rows[1:]):
            for part in group:
                _mark_part(units, part.factor, [w[part.inside] for w in part.where])
            left = [part for part in left if part not in group]
            continued.append(Factor(axes, rows[0]))
    return left, continued


def _spread_parts(parts: Sequence[_Part]) -> None:
    """Put parts that fill each other's gaps on the same axes."""
    filled: dict[tuple[int, ...], Any] = {}
    for part in parts:
        filled[part.axes] = filled.get(part.axes, False) | (part.found >= 0)
    # Parts that leave no gap on the axes that they have fill one another's there, as rows that are stacked do.
    partial = [part for part in parts if part.axes and not filled[part.axes].all()]
    changed = True
    while changed:
        changed = False
        for one, other in itertools.permutations(partial, 2):
            meet = set(one.axes) & set(other.axes) and not set(other.axes) <= set(one.axes)
            if meet and not ((one.found >= 0) & (other.found >= 0)).any():
                one.axes, changed = tuple(sorted({*one.axes, *other.axes})), True


def _numbered(chosen: Ints, tags: Ints, *others: Ints) -> Ints:
    """Tell apart what has the same unit, the same tag, and the same units of other factors, by its order."""
    _, inverse = np.unique(np.stack([x.ravel() for x in (chosen, tags, *others)]), axis=1, return_inverse=True)
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
