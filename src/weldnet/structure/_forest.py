"""Read the spaces off the units: colour refinement, bundles of equal classes, and a forest of what is nested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weldnet.structure._units import Ints, Units, distinct_rows

__all__ = ["Bundle", "Forest", "read_forest"]

NO_FREEDOM = "no other unit plays the same role"
IRREGULAR = "units tied to one another in a way that is not a renumbering"
TWO_PARENTS = "units tied to two spaces at once"


@dataclass(frozen=True)
class Bundle:
    """Classes of units that move as one space.

    ``classes[c]`` holds the units of one class in the bundle's common order; ``parent`` is the index of the
    bundle whose units are this one's blocks, which are contiguous in that order.
    """

    size: int
    classes: dict[int, Ints]
    parent: int | None = None


@dataclass(frozen=True)
class Forest:
    """The bundles, parents before children, and where every root unit went.

    Args:
        bundles: the spaces to be.
        bundle_of: bundle of each unit (-1 where frozen).
        index_of: index of each unit within its bundle.
        class_of: class of each unit.
        reasons: why a frozen unit is frozen.
    """

    bundles: tuple[Bundle, ...]
    bundle_of: Ints
    index_of: Ints
    class_of: Ints
    reasons: dict[int, str]


def read_forest(units: Units) -> Forest:
    """Turn units, relations and pins into a forest of bundles.

    What cannot be read as free, nested or determined is pinned, with the reason, and reading starts again.
    """
    roots = units.root
    pinned: dict[int, str] = {}
    for members, reason in units.pins:
        for unit in np.unique(roots[members]).tolist():
            pinned.setdefault(unit, reason)
    relations = _relations(units)
    colours = np.zeros(len(roots), np.int64)
    while True:
        colours = _refine(units, roots, relations, pinned, colours)
        reading = _read(roots, colours, relations)
        if isinstance(reading, list):
            return _forest(roots, colours, reading, _explain(roots, relations, pinned, colours))
        if isinstance(reading, dict):
            for unit, reason in reading.items():
                pinned.setdefault(unit, reason)
        else:
            first = int(relations[0].max(initial=0)) + 1
            rows = [np.stack([np.full(len(s), first + i), s, t]) for i, (s, t) in enumerate(reading)]
            relations = np.concatenate([relations, *rows], axis=1)


def _relations(units: Units) -> Ints:
    """All relations between roots as distinct rows (label, source, target)."""
    if not units.relations:
        return np.empty((3, 0), np.int64)
    columns = [np.concatenate(c) for c in zip(*((r.label, r.source, r.target) for r in units.relations), strict=True)]
    return np.stack(distinct_rows(columns[0], units.find(columns[1]), units.find(columns[2])))


# -- colour refinement -----------------------------------------------------------------------------


def _refine(units: Units, roots: Ints, relations: Ints, pinned: dict[int, str], start: Ints) -> Ints:
    """Return the coarsest equitable colouring that refines ``start``: a class number for each unit."""
    weight = _mix(_mix(start.astype(np.uint64)))
    np.add.at(weight, roots, _mix(units.origin.astype(np.uint64)))
    fixed = np.fromiter(pinned, np.int64, len(pinned))
    weight[fixed] += _mix((fixed + (1 << 40)).astype(np.uint64))
    label = relations[0].astype(np.uint64)
    s, t = relations[1], relations[2]
    # Mixed twice: labels and colours are both small numbers, and mixed once each they could cancel.
    out_label, in_label = _mix(_mix(label * np.uint64(2) + np.uint64(1))), _mix(_mix(label * np.uint64(2)))
    alive = roots == np.arange(len(roots))
    colours = _classes(weight, alive)
    while True:
        hashed = _mix(colours.astype(np.uint64) + np.uint64(7))
        following = hashed.copy()
        np.add.at(following, s, _mix(out_label + hashed[t]))
        np.add.at(following, t, _mix(in_label + hashed[s]))
        following = _classes(following, alive)
        if following.max(initial=0) == colours.max(initial=0):
            return colours[roots]
        colours = following


def _classes(values: np.ndarray, alive: np.ndarray) -> Ints:
    numbers = np.zeros(len(values), np.int64)
    numbers[alive] = np.unique(values[alive], return_inverse=True)[1]
    return numbers


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers (the finaliser of splitmix64, Steele et al. 2014), so that sums act as set hashes."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


# -- bundles and nesting ---------------------------------------------------------------------------


#: The bundles; or the units that break the pattern, with the reason; or relations that follow from others.
Reading = list[Bundle] | dict[int, str] | tuple[tuple[Ints, Ints], ...]


def _read(roots: Ints, colours: Ints, relations: Ints) -> Reading:
    """Group classes that move alike into bundles, and bundles into a forest."""
    alive = np.flatnonzero(roots == np.arange(len(roots)))
    order = alive[np.argsort(colours[alive], kind="stable")]
    edges = np.flatnonzero(np.r_[True, np.diff(colours[order]) != 0, True]) if order.size else np.zeros(1, np.int64)
    several = np.flatnonzero(np.diff(edges) > 1)
    members = {int(colours[order[edges[i]]]): order[edges[i] : edges[i + 1]] for i in several}
    maps = _class_maps(colours, members, relations)

    bundle_of: dict[int, int] = {}
    aligned: dict[int, Ints] = {}  # class -> its units in the bundle's order
    neighbours: dict[int, list[tuple[int, Ints, bool]]] = {}
    for source, target, image in maps:
        if len(members[source]) == len(members[target]):
            neighbours.setdefault(source, []).append((target, image, True))
            neighbours.setdefault(target, []).append((source, image, False))
    bundles: list[list[int]] = []
    for start in sorted(members, key=lambda c: int(members[c][0])):
        if start in bundle_of:
            continue
        aligned[start], bundle_of[start] = members[start], len(bundles)
        queue = [start]
        for current in queue:
            for other, image, forward in neighbours.get(current, []):
                mapped = _follow(aligned[current], members[current if forward else other], image, forward)
                if other not in bundle_of:
                    bundle_of[other], aligned[other] = len(bundles), mapped
                    queue.append(other)
                elif not np.array_equal(aligned[other], mapped):
                    return dict.fromkeys(members[current].tolist() + members[other].tolist(), IRREGULAR)
        bundles.append(queue)
    return _nest(bundles, bundle_of, aligned, members, maps)


def _class_maps(colours: Ints, members: dict[int, Ints], relations: Ints) -> list[tuple[int, int, Ints]]:
    """Relations between classes of more than one unit: (source class, target class, image of each member)."""
    label, source, target = relations
    if not label.size:
        return []
    a, b = colours[source], colours[target]
    sizes = np.zeros(int(colours.max(initial=0)) + 1, np.int64)
    for number, units in members.items():
        sizes[number] = len(units)
    keep = (sizes[a] > 1) & (sizes[b] > 1)
    label, source, target, a, b = label[keep], source[keep], target[keep], a[keep], b[keep]
    order = np.lexsort((source, b, a, label))
    label, source, target, a, b = label[order], source[order], target[order], a[order], b[order]
    edges = np.flatnonzero(np.r_[True, (np.diff(label) != 0) | (np.diff(a) != 0) | (np.diff(b) != 0)])
    maps: list[tuple[int, int, Ints]] = []
    for lo, hi in zip(edges, [*edges[1:], len(label)], strict=True):
        if lo < hi:
            maps.append((int(a[lo]), int(b[lo]), _image(members[int(a[lo])], source[lo:hi], target[lo:hi])))
    return maps


def _image(members: Ints, source: Ints, target: Ints) -> Ints:
    """The target of each member, or an empty array where the relation is not a function."""
    if len(source) != len(members) or not np.array_equal(source, members):
        return np.empty(0, np.int64)
    return target


def _follow(aligned: Ints, members: Ints, image: Ints, forward: bool) -> Ints:
    if image.size != members.size:
        return np.empty(0, np.int64)
    if forward:
        return image[np.searchsorted(members, aligned)]
    by_image = np.argsort(image)
    return members[by_image[np.searchsorted(image[by_image], aligned)]]


def _nest(
    bundles: list[list[int]],
    bundle_of: dict[int, int],
    aligned: dict[int, Ints],
    members: dict[int, Ints],
    maps: Sequence[tuple[int, int, Ints]],
) -> Reading:
    """Find each bundle's parent, and bring its units into blocks."""
    place = np.empty(1 + max((int(m.max()) for m in members.values()), default=0), np.int64)
    for units in aligned.values():
        place[units] = np.arange(len(units))
    above: dict[int, list[tuple[int, Ints]]] = {}
    for source, target, image in maps:
        units = members[source]
        if image.size != len(units):
            return dict.fromkeys(units.tolist() + members[target].tolist(), IRREGULAR)
        if source == target and not np.array_equal(image, units):
            return dict.fromkeys(units.tolist(), IRREGULAR)
        if len(members[source]) == len(members[target]):
            continue
        child, parent = bundle_of[source], bundle_of[target]
        onto = np.empty(len(units), np.int64)
        onto[place[units]] = place[image]
        known = above.setdefault(child, [])
        if not any(p == parent and np.array_equal(onto, m) for p, m in known):
            known.append((parent, onto))
    parents: dict[int, tuple[int, Ints]] = {}
    implied: list[tuple[Ints, Ints]] = []
    tangled: list[int] = []
    for child, found in above.items():
        nearest = max(found, key=lambda entry: int(entry[1].max()))
        for other, onto in found:
            if other == nearest[0] and np.array_equal(onto, nearest[1]):
                continue
            if any(up == other and np.array_equal(onto, over[nearest[1]]) for up, over in above.get(nearest[0], [])):
                continue
            between = _factor_through(nearest[1], onto)
            if other == nearest[0] or between is None:
                tangled.append(child)
            else:
                implied.append((aligned[bundles[nearest[0]][0]], aligned[bundles[other][0]][between]))
        parents[child] = nearest
    if implied:
        return tuple(implied)
    if tangled:
        return dict.fromkeys(np.concatenate([aligned[c] for c in bundles[tangled[0]]]).tolist(), TWO_PARENTS)
    return _in_order(bundles, aligned, parents)


def _factor_through(fine: Ints, coarse: Ints) -> Ints | None:
    """Return h with coarse = h(fine), which then moves along with both; None if there is none."""
    h = np.empty(int(fine.max()) + 1, np.int64)
    h[fine] = coarse
    return h if np.array_equal(h[fine], coarse) else None


def _in_order(bundles: list[list[int]], aligned: dict[int, Ints], parents: dict[int, tuple[int, Ints]]) -> list[Bundle]:
    """Sort parents before children and every child's units into its parent's blocks."""
    done: dict[int, int] = {}
    order_of: dict[int, Ints] = {}
    result: list[Bundle] = []
    waiting = list(range(len(bundles)))
    while waiting:
        later: list[int] = []
        for i in waiting:
            classes = bundles[i]
            size = len(aligned[classes[0]])
            if i not in parents:
                order, parent = np.arange(size), None
            elif parents[i][0] in done:
                up, onto = parents[i]
                rank = np.empty(len(order_of[up]), np.int64)
                rank[order_of[up]] = np.arange(len(rank))
                order, parent = np.argsort(rank[onto], kind="stable"), done[up]
            else:
                later.append(i)
                continue
            order_of[i], done[i] = order, len(result)
            result.append(Bundle(size, {c: aligned[c][order] for c in classes}, parent))
        if len(later) == len(waiting):
            raise AssertionError("nested spaces form a cycle")
        waiting = later
    return result


# -- results ---------------------------------------------------------------------------------------


def _forest(roots: Ints, colours: Ints, bundles: list[Bundle], reasons: dict[int, str]) -> Forest:
    bundle_of = np.full(len(roots), -1)
    index_of = np.full(len(roots), -1)
    for number, bundle in enumerate(bundles):
        for members in bundle.classes.values():
            bundle_of[members] = number
            index_of[members] = np.arange(bundle.size)
    return Forest(tuple(bundles), bundle_of[roots], index_of[roots], colours, reasons)


def _explain(roots: Ints, relations: Ints, pinned: dict[int, str], colours: Ints) -> dict[int, str]:
    """Give every unit that is alone in its class the reason of the nearest pinned unit."""
    texts = list(dict.fromkeys(pinned.values()))
    number = {text: i for i, text in enumerate(texts)}
    known = np.full(len(roots), -1)
    known[np.fromiter(pinned, np.int64, len(pinned))] = [number[text] for text in pinned.values()]
    alive = roots == np.arange(len(roots))
    sizes = np.bincount(colours[alive], minlength=int(colours.max(initial=0)) + 1)
    alone = alive & (sizes[colours] == 1)
    a, b = relations[1:, alone[relations[1]] & alone[relations[2]]]
    while True:
        told, untold = known[a] >= 0, known[b] >= 0
        forward, backward = told & ~untold, untold & ~told
        if not (forward | backward).any():
            break
        known[b[forward]] = known[a[forward]]
        known[a[backward]] = known[b[backward]]
    return {int(unit): texts[known[unit]] for unit in np.flatnonzero(known >= 0)}
