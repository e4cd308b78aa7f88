"""Optimal transport: one pass from the input to the output, a transport plan for every space (OTFusion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from weldnet.affinity import Pool
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._pictures import Pictures, from_activations, from_weights, next_root, norms
from weldnet.alignment._tree import Best, Only, Rule, Tree
from weldnet.assignment import Coupling, Permutation, Plan, best_permutation, entropic_plan, exact_plan
from weldnet.errors import UsageError
from weldnet.structure import Place, Space, Structure, partners, require_correspondence

__all__ = ["COSTS", "OptimalTransport"]

COSTS = ("euclidean", "squared", "cosine")

#: A unit without weights still has to go somewhere: the least mass, as a share of the mean.
_LEAST = 1e-6


@final
@dataclass(frozen=True, kw_only=True)
class OptimalTransport:
    """Couple units by transport plans, space after space, from the input to the output.

    For one space, the cost of bringing unit a of a network to unit u of the universe is the distance of their incoming
    weights, those of the network carried along the plans found so far, ``C[a, u] = |(T^T W)[a] - V[u]|``; or the
    distance of what the two units do on unlabelled inputs. The plan is ``argmin <T, C>`` with given row and column
    sums. Widths may differ: a unit of the universe is then the mean of what arrives there, and what the next layer
    reads is split over the units that it goes to.

    With equal widths and uniform marginals the exact plan is a permutation; else plans are soft, and every network but
    the first changes its function. Spaces that are nested or have blocks get permutations in any case, those
    with the smallest squared distances.

    Args:
        on: ``"weights"``, or ``"activations"`` on unlabelled inputs (pre-activation outputs of affine layers).
        cost: ``"euclidean"``, ``"squared"`` or ``"cosine"`` distance.
        normalise: divide every unit's features by their norm first.
        plan: ``"exact"``, or ``"entropic"``, which spreads every unit over several.
        epsilon: of the entropic plan, as a share of the space's largest cost.
        iterations: of the entropic plan, at most.
        marginals: how much a unit counts: ``"uniform"``, or by the ``"norm"`` of its features.
        barycentre: bring all networks to a barycentre of all of them, instead of to the first one.
        samples: unlabelled inputs that are looked at.

    Source: Singh and Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020; how widths that differ are carried is
    in ``docs/methods.md``.
    """

    on: Literal["weights", "activations"] = "weights"
    cost: Literal["euclidean", "squared", "cosine"] = "euclidean"
    normalise: bool = False
    plan: Literal["exact", "entropic"] = "exact"
    epsilon: float = 0.01
    iterations: int = 1000
    marginals: Literal["uniform", "norm"] = "uniform"
    barycentre: bool = False
    samples: int = 200
    name = "optimal_transport"
    order_invariant = False
    equivariant = True
    any_width = True

    def __post_init__(self) -> None:
        limits = {
            "on": (self.on in ("weights", "activations"), "weights or activations"),
            "cost": (self.cost in COSTS, ", ".join(COSTS)),
            "plan": (self.plan in ("exact", "entropic"), "exact or entropic"),
            "epsilon": (0 < self.epsilon < float("inf"), "above 0; the exact plan is plan='exact'"),
            "iterations": (self.iterations >= 1, "1 or more"),
            "marginals": (self.marginals in ("uniform", "norm"), "uniform or norm"),
            "samples": (self.samples >= 1, "1 or more"),
        }
        for option, (fine, allowed) in limits.items():
            if not fine:
                raise UsageError(f"optimal_transport: {option} is {getattr(self, option)!r}; give {allowed}")

    @property
    def needs_data(self) -> bool:
        """Whether it looks at activations."""
        return self.on == "activations"

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks to the first one, or all to their barycentre, in the first one's widths."""
        first = problem.names[0]
        for name in problem.names[1:]:
            require_correspondence(problem.structure_of(first), problem.structure_of(name), (first, name))
        if self.on == "weights":
            pictures = from_weights(problem)
        else:
            pictures = from_activations(problem, "optimal_transport", self.samples)
        walk = _Walk(self, pictures)
        walk.run()
        stats = {"cost": walk.mean_cost, "converged": walk.converged}
        alignment = Alignment(walk.couplings, repr(self), stats)
        hard = all(isinstance(c, Permutation) for c in walk.couplings[first].values())
        return alignment.relative_to(first) if hard else alignment


@dataclass
class _Walk:
    """One pass over the spaces.

    Args:
        method: the settings.
        pictures: what units are compared by.
        couplings: found so far, by network and space.
    """

    method: OptimalTransport
    pictures: Pictures
    couplings: dict[str, dict[str, Coupling]] = field(default_factory=dict)
    converged: bool = True
    costs: list[float] = field(default_factory=list)

    @property
    def mean_cost(self) -> float:
        """What the plans cost, as a share of what the product of their marginals would; averaged over spaces."""
        return sum(self.costs) / len(self.costs) if self.costs else 0.0

    def run(self) -> None:
        self.couplings = {name: {} for name in self.pictures.structures}
        roots = list(self.pictures.universe.roots)
        while roots:
            root = next_root(self.pictures, roots, next(iter(self.couplings.values())))
            roots.remove(root)
            if self.pictures.universe.children(root.name):
                self._couple_tree(root)
            else:
                self._couple_flat(root)
        order = [space.name for space in self.pictures.universe.spaces]
        self.couplings = {name: {s: found[s] for s in order} for name, found in self.couplings.items()}

    # -- flat spaces -------------------------------------------------------------------------------

    def _couple_flat(self, space: Space) -> None:
        features = {name: self.pictures.features(name, space, done) for name, done in self.couplings.items()}
        first, support = next(iter(features.items()))
        if self.method.barycentre:
            found = self._barycentre(features)
        else:
            found = {name: self._plan(rows, support) for name, rows in features.items() if name != first}
            found[first] = Permutation.identity(len(support))
        for name, coupling in found.items():
            self.couplings[name][space.name] = coupling

    def _barycentre(self, features: Mapping[str, Tensor], steps: int = 20) -> dict[str, Coupling]:
        """Move the universe's units to the mean of what arrives there, until they stay."""
        support = next(iter(features.values()))
        for _ in range(steps):
            found = {name: self._plan(rows, support) for name, rows in features.items()}
            before, support = support, torch.stack([_arriving(found[n], rows) for n, rows in features.items()]).mean(0)
            if float((support - before).norm()) <= 1e-4 * float(before.norm()):
                break
        return {name: self._plan(rows, support) for name, rows in features.items()}

    def _plan(self, rows: Tensor, support: Tensor) -> Coupling:
        cost = _cost(self.method, rows, support).cpu()
        size = len(support)
        if self.method.marginals == "uniform":
            a, b = cost.new_full((len(rows),), size / len(rows)), cost.new_ones(size)
        else:
            a, b = (_masses(x).cpu() * size for x in (rows, support))
        if self.method.plan == "exact" and self.method.marginals == "uniform" and len(rows) == size:
            coupling: Coupling = Permutation(best_permutation(-cost))
        elif self.method.plan == "exact":
            coupling = Plan(exact_plan(cost, a, b), a, b)
        else:
            values, met = entropic_plan(cost, a, b, self.method.epsilon, iterations=self.method.iterations)
            self.converged &= met
            coupling = Plan(values, a, b)
        apart = float((a[:, None] * b[None, :] * cost).sum()) / size
        self.costs.append(float((coupling.matrix() * cost).sum()) / apart if apart else 0.0)
        return coupling

    # -- spaces with blocks ------------------------------------------------------------------------

    def _couple_tree(self, root: Space) -> None:
        """Give all networks permutations of a root space and what is nested in it, those nearest to the first one's.

        What is inside the blocks of one space may depend on what is inside those of another (grouped convolutions): so
        first all is found without such tensors, then space by space with them.
        """
        tree = self.pictures.universe.tree(root.name)
        plain, tied = self._tensors(tree)
        ascent = self._ascent(tree, plain)
        rules: list[Rule] = [Best()]
        self._visit(ascent, root, rules)
        if tied:
            both = self._ascent(tree, [*plain, *tied])
            both.couplings, both.inner = ascent.couplings, ascent.inner
            self._visit(both, root, [*(Only(Best(), frozenset({space.name})) for space in tree[1:]), Best()])
            ascent = both
        for space in tree:
            self.couplings[ascent.names[0]][space.name] = Permutation.identity(space.size)
            for k in ascent.moving:
                self.couplings[ascent.names[k]][space.name] = Permutation(ascent.couplings[space.name][k - 1])

    def _visit(self, ascent: Ascent, root: Space, rules: Sequence[Rule]) -> None:
        for rule in rules:
            pools = Tree(ascent, root, _Nearness())
            for k in ascent.moving:
                pools.update(k, rule)

    def _tensors(self, tree: Sequence[Space]) -> tuple[list[str], list[str]]:
        """Return the tensors in which a tree can be compared now: those of one space of it, and those of several."""
        universe, pictures, done = self.pictures.universe, self.pictures, next(iter(self.couplings.values()))
        numbers = [i for space in tree for i in pictures.places(space.name)]
        unready = {universe.places[i].tensor for i in numbers if not pictures.ready(i, done, tree)}
        chosen = dict.fromkeys(universe.places[i].tensor for i in numbers if universe.places[i].tensor not in unready)
        tied = [universe.places[i].tensor for i in numbers if partners(universe, universe.places[i])]
        return [t for t in chosen if t not in tied], [t for t in chosen if t in tied]

    def _ascent(self, tree: tuple[Space, ...], tensors: Sequence[str]) -> Ascent:
        """Stack tensors of all networks for one tree, other axes carried; norms where nothing can be compared yet."""
        names, universe, pictures = tuple(self.couplings), self.pictures.universe, self.pictures
        inside = {space.name for space in tree}
        stacks = {t: torch.stack([pictures.carried(n, t, self.couplings[n]) for n in names]) for t in tensors}
        places = tuple(p for p in universe.places if p.tensor in stacks and p.space in inside)
        if not stacks:
            numbers = [i for space in tree for i in pictures.places(space.name)]
            stacks = {str(i): torch.stack([norms(pictures, n, i)[:, 0] for n in names]) for i in numbers}
            places = tuple(Place(str(i), universe.places[i].space, (0,)) for i in numbers)
        shapes = {name: tuple(stack.shape[1:]) for name, stack in stacks.items()}
        ascent = Ascent(Structure(tree, places, (), shapes), names, stacks, dict.fromkeys(stacks, 1.0))
        ascent.stay()
        return ascent


# -- costs -------------------------------------------------------------------------------------------


def _cost(method: OptimalTransport, rows: Tensor, support: Tensor) -> Tensor:
    """Return the distances of every row to every unit of the support, shape (units, universe units)."""
    if method.normalise or method.cost == "cosine":
        rows, support = (x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in (rows, support))
    if method.cost == "cosine":
        return (1 - rows @ support.T).clamp_min(0.0)
    squares = _squares(rows, support)
    return squares if method.cost == "squared" else squares.sqrt()


def _squares(rows: Tensor, support: Tensor) -> Tensor:
    squares = rows.square().sum(1)[:, None] + support.square().sum(1)[None, :] - 2 * rows @ support.T
    return squares.clamp_min(0.0)


def _masses(rows: Tensor) -> Tensor:
    """Return how much every unit counts by its norm, in sum 1."""
    found = rows.norm(dim=1)
    found = found + _LEAST * found.mean().clamp_min(torch.finfo(found.dtype).tiny)
    return found / found.sum()


def _arriving(coupling: Coupling, rows: Tensor) -> Tensor:
    if isinstance(coupling, Permutation):
        return rows[coupling.source.to(rows.device)]
    assert isinstance(coupling, Plan)
    return coupling.means.to(rows).T @ rows


class _Nearness:
    """Squared distances to the first network's units as scores: they add up over tensors, whatever their sizes."""

    def pool(self, rows: Sequence[Tensor], couplings: Sequence[Tensor]) -> Pool:
        """Put all networks' features together; see :class:`weldnet.affinity.Kernel`."""
        return _NearnessPool(list(rows))


@dataclass
class _NearnessPool:
    rows: list[Tensor]

    def scores(self, k: int) -> Tensor:
        return -_squares(self.rows[k], self.rows[0])

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        if rows is not None:
            self.rows[k] = rows
