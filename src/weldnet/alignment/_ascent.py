"""The state that block-coordinate methods share: features of all networks, couplings, and scores of one space.

The first network is the anchor: its units are the universe. Couplings of the others are, space by space, either
integer sources or soft matrices. Nested spaces have inner couplings too, for every pair of blocks, whether it is
coupled or not: where a tensor's axes depend on the block, they say how the blocks are to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weldnet.affinity import InnerProduct, Kernel, Pool
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._pools import Entry, Rebuilt, SpacePool, block_pool
from weldnet.alignment._products import BrickPool, Totals
from weldnet.alignment._rough import Rough
from weldnet.alignment._seen import Seen, State, mark_in
from weldnet.alignment._stacks import StoredStacks, mean_square, scaled_stack, sum_of_squares
from weldnet.alignment._workspace import Workspace
from weldnet.assignment import Permutation, best_inside, best_permutation, unfold
from weldnet.structure import (
    Brick,
    Maps,
    Place,
    Space,
    Structure,
    as_stored,
    block_space,
    bricks_of,
    carried_rows,
    partners,
    renumber,
    unit_rows,
)

__all__ = ["WEIGHTINGS", "Ascent", "Weighting", "by_norm", "inside_blocks", "sides", "start"]

#: How much a tensor counts, given its mean square and its number of entries, once it is scaled to mean square 1.
Weighting = Callable[[float, int], float]

#: What a visit may hold of all networks' features, in bytes, where their tensors lie on disk.
_HELD = 1 << 29

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
        stacks: for every tensor with a place, all networks' values scaled to mean square 1, shape (networks, ...); or
            what reads them when they are asked for.
        weights: how much each tensor counts.
        couplings: for each space the couplings of networks 1, 2, ..., integer sources (networks - 1, units) or soft
            matrices (networks - 1, units, universe).
        inner: for each nested space what happens inside when the parent's unit a goes to universe unit u: integer
            sources (networks - 1, a, u, block) or soft matrices (networks - 1, a, u, block, block).
        workspace: where couplings and progress are kept, for networks that are larger than memory; tensors are then
            read place by place whenever scores need them, and not held.
        rough: products in less than float32 for the scores of flat spaces; see :meth:`multiply_with`.
    """

    structure: Structure
    names: tuple[str, ...]
    stacks: Mapping[str, Tensor]
    weights: dict[str, float]
    couplings: MutableMapping[str, Tensor] = field(default_factory=dict)
    inner: MutableMapping[str, Tensor] = field(default_factory=dict)
    workspace: Workspace | None = None
    rough: Rough | None = None
    _bricks: dict[str, tuple[Brick, ...] | None] = field(default_factory=dict, init=False, repr=False)
    _inside: dict[Place, frozenset[str]] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[tuple[str, Kernel], Seen] = field(default_factory=dict, init=False, repr=False)
    _near: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False)
    _settled: dict[tuple[str, Hashable], list[State]] = field(default_factory=dict, init=False, repr=False)
    _totals: Totals = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Not a method of its own: all weights would wait for the garbage collector.
        read = partial(_values, self.stacks)
        self._totals = Totals(read) if self.workspace is None else Totals(read, self.workspace.sums)

    @property
    def moving(self) -> range:
        """The numbers of the networks that are moved."""
        return range(1, len(self.names))

    def tensor(self, name: str, k: int) -> Tensor:
        """Return the values of network ``k`` in a tensor, as they enter scores."""
        return _values(self.stacks, name, k)

    def pool(self, space: Space, kernel: Kernel) -> SpacePool:
        """Put together how all networks' units fit the universe, over all places of a space.

        What a pair had computed at an earlier visit, and no coupling has changed since, is not computed again: so
        nothing may be written into stacks that were scored.
        """
        couplings: list[Tensor] = []
        entries: list[Entry] = []
        before: dict[int, Tensor] = {}
        flat = len(self._family(space.name)) == 1
        rough = self.rough if flat and self.rough is not None and space.name not in self.rough.exact else None
        lazy = self._pair or not self._fits(space)
        for place in self.structure.places_of(space.name):
            pool: Pool | None = self._brick_pool(place, before, rough) if isinstance(kernel, InnerProduct) else None
            if pool is None:
                couplings = couplings or list(self.couplings[space.name].clone())
                build = partial(self._place_pool, place, kernel)
                pool = Rebuilt(build, couplings) if lazy else build(couplings)
            entries.append(Entry(place, self.weights[place.tensor], pool, self._inside_blocks(place)))
        found = SpacePool(space, entries, self.device, rough=rough)
        if self._pair and self.workspace is None and flat:
            found.seen = self._seen.setdefault((space.name, kernel), Seen())
            found.marks = self._marks
        return found

    def multiply_with(self, rough: Rough | None) -> None:
        """Take these products from here on, or those of float32; what others have computed is forgotten."""
        self.rough = rough
        self._seen.clear()
        self._totals.forget()

    @property
    def _pair(self) -> bool:
        return len(self.names) == 2

    def _fits(self, space: Space) -> bool:
        """Whether all networks' features in a space and what is nested with it can be held for a visit."""
        if self.workspace is None:
            return True
        places = [place for name in self._family(space.name) for place in self.structure.places_of(name)]
        numbers = sum(math.prod(self.structure.shapes[place.tensor]) for place in places)
        return 4 * len(self.names) * numbers <= _HELD

    def _brick_pool(self, place: Place, before: dict[int, Tensor], rough: Rough | None) -> BrickPool | None:
        """A pool of plain matrix products, where a tensor allows it."""
        if place.tensor not in self._bricks:
            self._bricks[place.tensor] = bricks_of(self.structure, place.tensor)
        whole = self._bricks[place.tensor]
        if whole is None:
            return None
        bricks = [brick for brick in whole if place in (brick.left, brick.right)]
        if self._pair:
            return BrickPool(place, bricks, self.couplings, self.tensor, rough=rough)
        if len(self._family(place.space)) > 1:
            return None
        others = [brick.other(place) for brick in bricks]
        if any(other is not None and other.space == place.space for other in others):
            return None  # running sums need one side to stay while the other moves
        hold = self.workspace is None
        return BrickPool(place, bricks, self.couplings, self.tensor, self._totals, before, hold=hold, rough=rough)

    def _marks(self, place: Place) -> list[State]:
        """Mark what a pair's scores in a place depend on: the couplings of the spaces on the other axes."""
        names: dict[str, None] = {}
        for other in self.structure.places_in(place.tensor):
            if other.axes != place.axes or other.view is not None or place.view is not None:
                names |= dict.fromkeys(self._family(other.space))
        return [mark_in(kept, name) for name in names for kept in (self.couplings, self.inner) if name in kept]

    def is_settled(self, root: Space, rule: Hashable) -> bool:
        """Whether nothing that decides a root space has changed since :meth:`settle` was told of the same rule."""
        return self._settled.get((root.name, rule)) == self._situation(root)

    def settle(self, root: Space, rule: Hashable) -> None:
        """Say that a rule leaves a root space, and what is nested in it, where they are now."""
        self._settled[root.name, rule] = self._situation(root)

    def near(self, root: Space) -> tuple[str, ...]:
        """Return the spaces that share a tensor with a tree of spaces, and their trees; it is among them."""
        if root.name not in self._near:
            tensors = [p.tensor for space in self._family(root.name) for p in self.structure.places_of(space)]
            spaces = [p.space for tensor in dict.fromkeys(tensors) for p in self.structure.places_in(tensor)]
            self._near[root.name] = tuple(dict.fromkeys(name for space in spaces for name in self._family(space)))
        return self._near[root.name]

    def _situation(self, root: Space) -> list[State]:
        return [
            mark_in(kept, name) for name in self.near(root) for kept in (self.couplings, self.inner) if name in kept
        ]

    def _family(self, space: str) -> tuple[str, ...]:
        """A space and all that it is nested in, or that is nested in those."""
        while (parent := self.structure.space(space).parent) is not None:
            space = parent
        return tuple(found.name for found in self.structure.tree(space))

    def _inside_blocks(self, place: Place) -> frozenset[str]:
        if place not in self._inside:
            self._inside[place] = inside_blocks(self.structure, place)
        return self._inside[place]

    def _place_pool(self, place: Place, kernel: Kernel, couplings: Sequence[Tensor]) -> Pool:
        stack = self.stacks[place.tensor]
        rows = carried_rows(stack[1:], self.structure, place, self.maps())
        if rows.dim() == 4:
            return block_pool(kernel, unit_rows(stack[0], self.structure, place), rows, couplings)
        anchor = carried_rows(stack[:1], self.structure, place, Maps())
        return kernel.pool([*anchor, *rows], couplings)

    def refresh(self, pool: SpacePool, k: int) -> None:
        """Give a pool the latest couplings of network ``k``, also inside blocks."""
        coupling = self.couplings[pool.space.name][k - 1].clone()
        for entry in pool.entries:
            rows = None
            if entry.inside and not isinstance(entry.pool, Rebuilt):
                stack = self.tensor(entry.place.tensor, k).unsqueeze(0)
                rows = carried_rows(stack, self.structure, entry.place, self.maps(k))[0]
            entry.pool.replace(k, coupling, rows)

    def maps(self, k: int | None = None) -> Maps:
        """Return the couplings of network ``k``, or of all networks, as maps to carry tensors along."""
        if k is None:
            return Maps(self.couplings, self.inner)
        return Maps(_Own(self.couplings, k), _Own(self.inner, k))

    def put(self, space: str, k: int, *, whole: Tensor | None = None, inside: Tensor | None = None) -> None:
        """Give network ``k`` a coupling, or an inner coupling, of one space."""
        for kept, value in ((self.couplings, whole), (self.inner, inside)):
            if value is not None:
                values = kept[space]
                if not value.is_floating_point() and torch.equal(values[k - 1], value.to(values)):
                    continue  # what is not written to is known to be unchanged
                values = values if values.is_contiguous() else values.clone()
                values[k - 1] = value
                kept[space] = values

    def couple(self, root: Space, k: int, coupling: Tensor) -> float:
        """Give network ``k`` a coupling of a root space, and what is nested in it the whole couplings that follow.

        Returns:
            The mass that moved, in units.
        """
        moved = 0.0
        for space in self.structure.tree(root.name):
            if space.parent is not None:
                coupling = unfold(self.couplings[space.parent][k - 1], self.inner[space.name][k - 1])
            old = self.couplings[space.name][k - 1]
            soft = coupling.is_floating_point()
            moved += float((coupling - old).abs().sum()) / 2 if soft else float((coupling.to(old) != old).sum())
            self.put(space.name, k, whole=coupling)
        return moved

    # -- what a workspace keeps; nothing without one ----------------------------------------------------

    def begin(self, what: str, roots: Sequence[Space]) -> None:
        """Say what begins: one visit of each of these root spaces."""
        if self.workspace is not None and isinstance(self.stacks, StoredStacks):
            spaces = [space.name for root in roots for space in self.structure.tree(root.name)]
            tensors = [place.tensor for name in spaces for place in self.structure.places_of(name)]
            self.workspace.begin(what, len(self.moving) * sum(map(self.stacks.nbytes, tensors)))

    def keep(self, stage: str, progress: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep the couplings, and how far a stage is, for a later process to go on from.

        Sums are then made anew in this process too, as they are in that one.
        """
        if self.workspace is not None:
            self._totals.forget()
            self.workspace.keep(stage, progress, tensors)

    def resume(self, stage: str) -> dict[str, Any] | None:
        """Take up the couplings that an earlier process kept in this stage; return how far it was, or None."""
        found = None if self.workspace is None else self.workspace.resume(stage)
        return None if found is None else {**found[0], "tensors": found[1]}

    def stay(self) -> None:
        """Make all couplings identities."""
        count = len(self.moving)
        for space in self.structure.spaces:
            self.couplings[space.name] = torch.arange(space.size, device=self.device).repeat(count, 1)
            if space.parent is not None:
                blocks, each = space.size // space.block, torch.arange(space.block, device=self.device)
                self.inner[space.name] = each.repeat(count, blocks, blocks, 1)

    def soften(self, spaces: Sequence[Space] | None = None) -> None:
        """Make the couplings of whole trees of spaces uniform, of all if None: nobody is preferred."""
        count = len(self.moving)
        for space in self.structure.spaces if spaces is None else spaces:
            self.couplings[space.name] = self._uniform((count, space.size, space.size))
            if space.parent is not None:
                blocks = space.size // space.block
                self.inner[space.name] = self._uniform((count, blocks, blocks, space.block, space.block))

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full([1] * len(shape), 1 / shape[-1], device=self.device).expand(shape)

    def harden(self, spaces: Sequence[Space] | None = None) -> None:
        """Bring the soft couplings of whole trees of spaces, of all if None, to the nearest permutations."""
        for space in self.structure.spaces if spaces is None else spaces:
            if space.parent is None:
                plans = self.couplings[space.name]
                found = [best_permutation(plan) for plan in plans]
            else:
                self.inner[space.name] = best_inside(self.inner[space.name]).to(self.device)
                parents = self.couplings[space.parent]
                found = [unfold(p, inner) for p, inner in zip(parents, self.inner[space.name], strict=True)]
            self.couplings[space.name] = torch.stack(found).to(self.device)

    def fit(self, spaces: Sequence[Space], kernel: Kernel, k: int) -> float:
        """Return how well network ``k`` fits the universe over all tensors with a place in the spaces, each once.

        Couplings must be hard.
        """
        names = {space.name for space in spaces}
        total = 0.0
        for space in spaces:
            source = self.couplings[space.name][k - 1]
            universe = torch.arange(len(source), device=source.device)
            for entry in self.pool(space, kernel).entries:
                fit = float(entry.pool.scores(k)[source, universe].sum(dtype=torch.float64))
                total += entry.weight * fit / len(sides(self.structure, entry.place.tensor, names))
        return total

    @property
    def device(self) -> torch.device:
        """Where the stacks lie."""
        if isinstance(self.stacks, StoredStacks):
            return self.stacks.device
        return next((stack.device for stack in self.stacks.values()), torch.device("cpu"))

    def objective(self) -> float:
        """Return the mean cosine between the networks' tensors in the universe, over all pairs and all spaces' tensors.

        Couplings must be hard. 1 means that all networks are equal up to renumbering.
        """
        count = len(self.names)
        sources = [{name: self.couplings[name][k - 1] for name in self.couplings} if k else {} for k in range(count)]
        inner, norms = 0.0, 0.0
        for name in self.stacks:
            total, own = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
            for k in range(count):
                moved = renumber({name: self.tensor(name, k)}, self.structure, sources[k])[name]
                own += sum_of_squares(moved)
                total = total.add_(moved) if k else moved.double()
            inner += self.weights[name] * (sum_of_squares(total) - own)
            norms += self.weights[name] * own * (count - 1)
        return inner / norms if norms else 1.0

    def alignment(self, method: str, stats: Mapping[str, object], names: Sequence[str]) -> Alignment:
        """Return the hard couplings as an alignment of the networks in the order of ``names``, the first as anchor."""
        couplings = {self.names[0]: {s.name: Permutation.identity(s.size) for s in self.structure.spaces}}
        for k in self.moving:
            couplings[self.names[k]] = {s: Permutation(c[k - 1]) for s, c in self.couplings.items()}
        return Alignment({name: couplings[name] for name in names}, method, stats).relative_to(names[0])


def _values(stacks: Mapping[str, Tensor], name: str, k: int) -> Tensor:
    return stacks.one(name, k) if isinstance(stacks, StoredStacks) else stacks[name][k]


def inside_blocks(structure: Structure, place: Place) -> frozenset[str]:
    """Return the spaces whose inner couplings say how the blocks are to be compared on which a place depends."""
    found: set[str] = set()
    above = block_space(structure, place) if partners(structure, place) else None
    for space in (structure.space(partner.space) for partner in partners(structure, place)):
        while space.parent is not None and space != above:
            found.add(space.name)
            space = structure.space(space.parent)
    return frozenset(found)


@dataclass(frozen=True)
class _Own(Mapping[str, Tensor]):
    """The couplings of network ``k``, each as a stack of one."""

    kept: Mapping[str, Tensor]
    k: int

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name][self.k - 1 : self.k]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def start(problem: Problem, weighting: str, order: Sequence[str] | None = None) -> Ascent:
    """Stack the networks' tensors in float32, scaled to mean square 1, with identity couplings.

    Where the problem has a workspace, tensors are read when they are asked for.
    """
    names = tuple(order or problem.names)
    structure, workspace = problem.structure, problem.workspace
    states = [problem.states[name] for name in names]
    stored = StoredStacks(states, problem.device, {}, workspace) if workspace is not None else None
    stacks: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for name in dict.fromkeys(place.tensor for place in structure.places):
        entries = math.prod(structure.shapes[name])
        if stored is not None:
            square = stored.squares[name] = stored.mean_square(name)
        else:
            tensors = [state[name].detach().to(problem.device, torch.float32) for state in states]
            square = mean_square(tensors)
            stacks[name] = as_stored(structure, name, scaled_stack(tensors, square))
        weights[name] = WEIGHTINGS[weighting](square, entries)
    ascent = Ascent(structure, names, stored or stacks, weights, workspace=workspace)
    if workspace is not None:
        ascent.couplings, ascent.inner = workspace.couplings, workspace.inner
    ascent.stay()
    return ascent


def by_norm(problem: Problem) -> list[str]:
    """Order the networks by a number that neither their order nor the numbering of their units changes."""

    def norm(name: str) -> float:
        tensors = {place.tensor for place in problem.structure.places}
        return sum(sum_of_squares(problem.states[name][t].detach()) for t in sorted(tensors))

    return sorted(problem.names, key=norm)


def sides(structure: Structure, tensor: str, spaces: set[str]) -> set[tuple[tuple[int, ...], object]]:
    """The axes of a tensor on which some of the spaces lie."""
    return {(place.axes, place.view) for place in structure.places_in(tensor) if place.space in spaces}
