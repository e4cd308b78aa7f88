"""One visit of a root space and everything nested in it: from the leaves up, inner couplings first, then the outer one.

For every pair of blocks the inner coupling is found given what lies inside them; what it is worth joins the outer
scores. A tensor whose axes depend on the blocks (a grouped convolution between two spaces of the tree) is scored given
the inner coupling of its other axis, pair by pair, and counts once in the outer scores: at the space visited last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from weldnet.affinity import Kernel
from weldnet.alignment._ascent import Ascent
from weldnet.assignment import as_blocks, as_matrix, best_inside, best_permutation, fit_inside
from weldnet.structure import Place, Space, Structure, block_space, partners

__all__ = ["Best", "Definite", "Only", "Rule", "Tree", "is_entangled"]

#: Gains below this share of the scores are rounding in float32: to follow them would only cycle.
_ROUNDING = 1e-6


class Rule(Protocol):
    """How scores become couplings."""

    def inside(self, space: str, k: int, blocks: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return inner couplings, and what each pair of blocks is worth.

        Args:
            space: the nested space.
            k: the network.
            blocks: scores, shape (blocks, universe blocks, inner, inner).
            old: the present inner couplings.
        """
        ...

    def outside(self, space: str, k: int, scores: Tensor, old: Tensor) -> Tensor:
        """Return the coupling of a root space, given its scores and its present coupling."""
        ...


class Best:
    """Permutations, the best ones; the present ones where nothing is better by more than rounding."""

    def inside(self, space: str, k: int, blocks: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Solve every pair of blocks; see :class:`Rule`."""
        exact = blocks.double()
        found = best_inside(exact).to(old)
        before, after = fit_inside(old, exact), fit_inside(found, exact)
        better = after - before > _ROUNDING * exact.abs().amax(-2).sum(-1)
        return torch.where(better[..., None], found, old), torch.where(better, after, before)

    def outside(self, space: str, k: int, scores: Tensor, old: Tensor) -> Tensor:
        """Solve one assignment; see :class:`Rule`."""
        exact = scores.double()
        found = best_permutation(exact).to(old)
        gain = fit_inside(found, exact) - fit_inside(old, exact)
        return found if gain > _ROUNDING * exact.abs().amax(0).sum() else old


class Definite:
    """Permutations, the best ones, as matrices of zeros and ones: for couplings that began soft."""

    def inside(self, space: str, k: int, blocks: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Solve every pair of blocks; see :class:`Rule`."""
        exact = blocks.double()
        found = best_inside(exact).to(blocks.device)
        return as_matrix(found, blocks.dtype), fit_inside(found, exact)

    def outside(self, space: str, k: int, scores: Tensor, old: Tensor) -> Tensor:
        """Solve one assignment; see :class:`Rule`."""
        return as_matrix(best_permutation(scores).to(scores.device), scores.dtype)


@dataclass(frozen=True)
class Only:
    """Move some spaces of the tree; the others stay."""

    rule: Rule
    spaces: frozenset[str]

    def inside(self, space: str, k: int, blocks: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the inner couplings of other spaces; see :class:`Rule`."""
        if space in self.spaces:
            return self.rule.inside(space, k, blocks, old)
        return old, fit_inside(old, blocks.double())

    def outside(self, space: str, k: int, scores: Tensor, old: Tensor) -> Tensor:
        """Keep the coupling of another space; see :class:`Rule`."""
        return self.rule.outside(space, k, scores, old) if space in self.spaces else old


class Tree:
    """The pools of a root space and everything nested in it, for one visit."""

    def __init__(self, ascent: Ascent, root: Space, kernel: Kernel) -> None:
        self._ascent, self._root = ascent, root
        self._leaves_first = ascent.structure.tree(root.name)[::-1]
        self._pools = {space.name: ascent.pool(space, kernel) for space in self._leaves_first}
        self._apart = _counted_elsewhere(ascent.structure, self._leaves_first)

    def update(self, k: int, rule: Rule) -> float:
        """Give network ``k`` new couplings; return the mass that moved, in units."""
        above: dict[str, Tensor] = {}  # what the blocks of nested spaces are worth, by parent
        later: dict[str, dict[str, Tensor]] = {}  # what must not count there, by space and where it must not
        for space in self._leaves_first:
            total, apart = self._pools[space.name].split_scores(k, self._apart)
            if space.name in above:
                total = total + above[space.name]
            for name, part in later.get(space.name, {}).items():
                apart[name] = apart[name] + part if name in apart else part
            if space.name in apart:
                total = total - apart.pop(space.name)
            if space.parent is None:
                return self._finish(k, rule.outside(space.name, k, total, self._ascent.couplings[space.name][k - 1]))
            values, apart = self._update_inside(space, k, rule, total, apart)
            above[space.parent] = above[space.parent] + values if space.parent in above else values
            for name, part in apart.items():
                known = later.setdefault(space.parent, {})
                known[name] = known[name] + part if name in known else part
        raise AssertionError("a tree ends with its root")

    def _update_inside(
        self, space: Space, k: int, rule: Rule, total: Tensor, apart: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inner = self._ascent.inner[space.name]
        blocks = inner.shape[1]
        found, values = rule.inside(space.name, k, as_blocks(total, blocks), inner[k - 1])
        self._ascent.put(space.name, k, inside=found)
        for other in self._leaves_first:
            pool = self._pools[other.name]
            if any(space.name in entry.inside for entry in pool.entries):
                self._ascent.refresh(pool, k)
        return values, {name: fit_inside(found, as_blocks(part, blocks)) for name, part in apart.items()}

    def _finish(self, k: int, coupling: Tensor) -> float:
        moved = self._ascent.couple(self._root, k, coupling)
        if len(self._ascent.moving) > 1:
            for space in self._leaves_first:
                self._pools[space.name].replace(k, self._ascent.couplings[space.name][k - 1].clone())
        return moved


def is_entangled(structure: Structure, tree: tuple[Space, ...]) -> bool:
    """Whether scores in a tree do not hold once all of it moves, so that moving could go down.

    That is so where a tensor has two axes in the tree: the scores of one hold only while the other stays. Axes that
    depend on the same blocks are no trouble where one of them can be visited after all others.
    """
    names = [space.name for space in tree]
    order = {name: i for i, name in enumerate(reversed(names))}
    for tensor in dict.fromkeys(place.tensor for name in names for place in structure.places_of(name)):
        sides: dict[tuple[int, ...], list[Place]] = {}
        for place in structure.places_in(tensor):
            if place.space in order:
                sides.setdefault(place.axes, []).append(place)
        for one, other in combinations(sides.values(), 2):
            if not set(other) <= set(partners(structure, one[0])):
                return True
        spans = sorted((max(order[p.space] for p in s), min(order[p.space] for p in s)) for s in sides.values())
        if len(spans) > 1 and spans[-1][1] <= spans[-2][0]:
            return True
    return False


def _counted_elsewhere(structure: Structure, leaves_first: tuple[Space, ...]) -> dict[Place, str]:
    """Places whose tensor counts through a space visited later; and the space from whose scores on it must not."""
    order = {space.name: i for i, space in enumerate(leaves_first)}
    found: dict[Place, str] = {}
    for place in (place for name in order for place in structure.places_of(name)):
        others = [order[p.space] for p in partners(structure, place) if p.space in order]
        own = [order[p.space] for p in structure.places_in(place.tensor) if p.axes == place.axes and p.space in order]
        if others and max(others) > max(own):
            at = block_space(structure, place)
            if at is not None:
                found[place] = at.name
    return found
