"""The state that block-coordinate methods share: features of all networks, couplings, and scores of one space.

The first network is the anchor: its units are the universe. Couplings of the others are, space by space, either
integer sources or soft matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weldnet.affinity import Kernel, Pool
from weldnet.alignment._method import Alignment, Problem
from weldnet.assignment import Nest, Permutation, best_nested_permutations
from weldnet.structure import Space, Structure, carried_rows, renumber

__all__ = ["WEIGHTINGS", "Ascent", "Weighting", "hard_sweeps", "start"]

#: How much a tensor counts, given its mean square and its number of entries, once it is scaled to mean square 1.
Weighting = Callable[[float, int], float]

WEIGHTINGS: dict[str, Weighting] = {
    "raw": lambda square, entries: square,
    "entry": lambda square, entries: 1.0,
    "tensor": lambda square, entries: 1.0 / entries,
    "root": lambda square, entries: entries**-0.5,
}


@dataclass
class Ascent:
    """Networks on their way to a common order.

    Args:
        structure: where the units lie.
        names: of the networks; the first is the anchor.
        stacks: for every tensor with a place, all networks' values scaled to mean square 1, shape (networks, ...).
        weights: how much each tensor counts.
        couplings: for each space the couplings of networks 1, 2, ..., integer sources (networks - 1, units) or soft
            matrices (networks - 1, units, universe).
    """

    structure: Structure
    names: tuple[str, ...]
    stacks: dict[str, Tensor]
    weights: dict[str, float]
    couplings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def moving(self) -> range:
        """The numbers of the networks that are moved."""
        return range(1, len(self.names))

    def pool(self, space: Space, kernel: Kernel) -> SpacePool:
        """Put together how all networks' units fit the universe, over all places of a space."""
        pools: list[tuple[float, Pool]] = []
        for place in self.structure.places_of(space.name):
            maps = {p.space: self.couplings[p.space] for p in self.structure.places_in(place.tensor)}
            stack = self.stacks[place.tensor]
            anchor = carried_rows(stack[:1], self.structure, place, {})
            rows = [*anchor, *carried_rows(stack[1:], self.structure, place, maps)]
            pools.append((self.weights[place.tensor], kernel.pool(rows, list(self.couplings[space.name].clone()))))
        return SpacePool(space, pools, self.device)

    def assign(self, root: Space, kernel: Kernel) -> bool:
        """Give every network in turn the best hard couplings of a root space and what is nested in it.

        Returns:
            Whether anything moved.
        """
        tree = self.structure.tree(root.name)
        pools = {space.name: self.pool(space, kernel) for space in tree}
        entangled = _entangled(self.structure, tree)
        moved = False
        for k in self.moving:
            scores = {name: pool.scores(k) for name, pool in pools.items()}
            best = best_nested_permutations(_nest(self.structure, root, scores))
            if not self._improves(scores, best, k):
                continue
            if entangled:
                if self._ascends(tree, kernel, scores, best, k):
                    moved = True
                    pools = {space.name: self.pool(space, kernel) for space in tree}
                continue
            moved = True
            for name, source in best.items():
                self.couplings[name][k - 1] = source
                pools[name].replace(k, self.couplings[name][k - 1])
        return moved

    def _ascends(
        self, tree: Sequence[Space], kernel: Kernel, scores: dict[str, Tensor], best: dict[str, Tensor], k: int
    ) -> bool:
        """Move to the best couplings if that really is better; else try one space of the tree after the other.

        Where a tensor has two axes in one tree (a grouped convolution, or a layer from a space to itself), the scores
        hold only while the other axis stays. Moving both by them could go down, and cycle.
        """
        old = {space.name: self.couplings[space.name][k - 1].clone() for space in tree}
        before = self._value(tree, kernel, k)
        candidates = [best]
        for space in tree if len(tree) > 1 else ():
            pinned = {s.name: _pin(old[s.name], scores[s.name]) for s in tree} | {space.name: scores[space.name]}
            candidates.append(best_nested_permutations(_nest(self.structure, tree[0], pinned)))
        for candidate in candidates:
            for name, source in candidate.items():
                self.couplings[name][k - 1] = source
            if self._value(tree, kernel, k) > before + 1e-6 * abs(before):
                return True
        for name, source in old.items():
            self.couplings[name][k - 1] = source
        return False

    def _value(self, tree: Sequence[Space], kernel: Kernel, k: int) -> float:
        """Return how well network ``k`` fits the universe over all tensors with a place in the tree, each once."""
        names = {space.name for space in tree}
        total = 0.0
        for space in tree:
            source = self.couplings[space.name][k - 1]
            universe = torch.arange(len(source), device=source.device)
            pools = self.pool(space, kernel).pools
            for place, (weight, pool) in zip(self.structure.places_of(space.name), pools, strict=True):
                fit = float(pool.scores(k)[source, universe].sum(dtype=torch.float64))
                total += weight * fit / len(_sides(self.structure, place.tensor, names))
        return total

    def _improves(self, scores: Mapping[str, Tensor], best: Mapping[str, Tensor], k: int) -> bool:
        """Whether new couplings raise the scores by more than float32 can tell: else moving would only cycle."""
        gain, size = 0.0, 0.0
        for name, source in best.items():
            universe = torch.arange(len(source))
            table = scores[name].double().cpu()
            old = self.couplings[name][k - 1].cpu()
            gain += float(table[source, universe].sum() - table[old, universe].sum())
            size += float(table.abs().amax(0).sum())
        return gain > 1e-6 * size

    @property
    def device(self) -> torch.device:
        """Where the stacks lie."""
        return next((stack.device for stack in self.stacks.values()), torch.device("cpu"))

    def objective(self) -> float:
        """Return the mean cosine between the networks' tensors in the universe, over all pairs and all spaces' tensors.

        Couplings must be hard. 1 means that all networks are equal up to renumbering.
        """
        count = len(self.names)
        inner, norms = 0.0, 0.0
        states = [
            renumber(
                {name: stack[k] for name, stack in self.stacks.items()},
                self.structure,
                {s: c[k - 1] for s, c in self.couplings.items()} if k else {},
            )
            for k in range(count)
        ]
        for name in self.stacks:
            moved = torch.stack([state[name].flatten() for state in states]).double()
            total = moved.sum(0)
            own = float(moved.square().sum())
            inner += self.weights[name] * (float(total.square().sum()) - own)
            norms += self.weights[name] * own * (count - 1)
        return inner / norms if norms else 1.0

    def alignment(self, method: str, stats: Mapping[str, object], names: Sequence[str]) -> Alignment:
        """Return the hard couplings as an alignment of the networks in the order of ``names``, the first as anchor."""
        couplings = {self.names[0]: {s.name: Permutation.identity(s.size) for s in self.structure.spaces}}
        for k in self.moving:
            couplings[self.names[k]] = {s: Permutation(c[k - 1]) for s, c in self.couplings.items()}
        return Alignment({name: couplings[name] for name in names}, method, stats).relative_to(names[0])


@dataclass
class SpacePool:
    """The pools of a space's places, weighted."""

    space: Space
    pools: list[tuple[float, Pool]]
    device: torch.device

    def scores(self, k: int) -> Tensor:
        """Return how well the units of network ``k`` fit the universe, shape (units, universe)."""
        total = torch.zeros(self.space.size, self.space.size, device=self.device)
        for weight, pool in self.pools:
            total.add_(pool.scores(k), alpha=weight)
        return total

    def replace(self, k: int, coupling: Tensor) -> None:
        """Give network ``k`` another coupling."""
        for _, pool in self.pools:
            pool.replace(k, coupling)


def start(problem: Problem, weighting: str, order: Sequence[str] | None = None) -> Ascent:
    """Stack the networks' tensors in float32, scaled to mean square 1, with identity couplings."""
    names = tuple(order or problem.names)
    structure = problem.structure
    stacks: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for name in dict.fromkeys(place.tensor for place in structure.places):
        tensors = [problem.states[n][name].detach().to(problem.device, torch.float32) for n in names]
        stack = torch.stack([t.to(tensors[0].device) for t in tensors])
        square = float(stack.double().square().mean())
        stacks[name] = stack / square**0.5 if square else stack
        weights[name] = WEIGHTINGS[weighting](square, stack[0].numel())
    ascent = Ascent(structure, names, stacks, weights)
    for space in structure.spaces:
        ascent.couplings[space.name] = torch.arange(space.size, device=ascent.device).repeat(len(names) - 1, 1)
    return ascent


def _nest(structure: Structure, space: Space, scores: Mapping[str, Tensor]) -> Nest:
    children = tuple(_nest(structure, child, scores) for child in structure.children(space.name))
    return Nest(space.name, scores[space.name], children)


def _sides(structure: Structure, tensor: str, spaces: set[str]) -> set[tuple[tuple[int, ...], object]]:
    """The axes of a tensor on which some of the spaces lie."""
    return {(place.axes, place.view) for place in structure.places_in(tensor) if place.space in spaces}


def _entangled(structure: Structure, tree: Sequence[Space]) -> bool:
    names = {space.name for space in tree}
    tensors = {place.tensor for name in names for place in structure.places_of(name)}
    return any(len(_sides(structure, tensor, names)) > 1 for tensor in tensors)


def _pin(source: Tensor, scores: Tensor) -> Tensor:
    """Scores that no coupling but the present one can reach."""
    pinned = torch.zeros_like(scores)
    pinned[source, torch.arange(len(source), device=source.device)] = 4 * float(scores.abs().sum()) + 1
    return pinned


def hard_sweeps(ascent: Ascent, kernel: Kernel, orders: Iterable[Sequence[Space]]) -> tuple[int, bool]:
    """Assign space after space until a whole sweep moves nothing.

    Returns:
        The number of sweeps, and whether the last one moved nothing.
    """
    sweeps = 0
    for order in orders:
        sweeps += 1
        moved = [ascent.assign(root, kernel) for root in order]  # every one, not only up to the first that moves
        if not any(moved):
            return sweeps, True
    return sweeps, False
