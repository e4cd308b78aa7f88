"""Frank-Wolfe: all pairs of networks at once, through a universe (C2M3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import WEIGHTINGS, Ascent, by_norm, start
from weldnet.alignment._line import Line, degree, nodes
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._sweeps import hard_sweeps
from weldnet.alignment._tree import Definite, Tree
from weldnet.assignment import unfold
from weldnet.errors import UsageError
from weldnet.structure import Maps, carried

__all__ = ["FrankWolfe", "climb"]


@final
@dataclass(frozen=True, kw_only=True)
class FrankWolfe:
    """Climb ``sum_(k < k') <U_k W_k, U_k' W_k'>`` over doubly stochastic couplings of all networks and spaces at once.

    From uniform couplings, each step takes the gradient at the present ones, solves one linear assignment for every
    network and space, and goes towards these permutations as far as is best: on that line the objective is a polynomial
    (of degree 4 where a tensor lies between two spaces), known exactly from a few points. It never falls. Once a step
    gains little, the couplings go to the nearest permutations, and assignments from there, as in weight matching, end
    it. The units of the network with the smallest norm are the universe, so that all couplings are cycle-consistent,
    and neither the order of the networks nor the numbering of their units matters. A nested space has an inner coupling
    for every pair of blocks; the line then goes through outer and inner ones together.

    Args:
        weighting: how much a tensor counts: ``"root"`` by the square root of its number of entries, ``"entry"`` by that
            number, ``"tensor"`` all alike, ``"raw"`` by its values, as published.
        steps: at most.
        tolerance: the climb ends once a step gains less than this share of the objective.
        hard_sweeps: at most, at the end.

    Source: Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging", https://arxiv.org/abs/2405.17897.
    """

    weighting: Literal["raw", "entry", "root", "tensor"] = "root"
    steps: int = 200
    tolerance: float = 1e-4
    hard_sweeps: int = 100
    name = "frank_wolfe"
    order_invariant = True
    equivariant = True
    needs_data = False
    any_width = False

    def __post_init__(self) -> None:
        limits = {
            "weighting": (self.weighting in WEIGHTINGS, " or ".join(WEIGHTINGS)),
            "steps": (self.steps >= 1, "1 or more"),
            "tolerance": (0 <= self.tolerance < 1, "at least 0 and below 1"),
            "hard_sweeps": (self.hard_sweeps >= 1, "1 or more"),
        }
        for option, (fine, allowed) in limits.items():
            if not fine:
                raise UsageError(f"frank_wolfe: {option} is {getattr(self, option)!r}; give {allowed}")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe is given in the order of the first."""
        ascent = start(problem, self.weighting, by_norm(problem))
        ascent.soften()
        values = [-math.inf]
        for value in itertools.islice(climb(ascent), self.steps):
            values.append(value)
            if value - values[-2] <= self.tolerance * abs(value):
                break
        ascent.harden()
        roots = problem.structure.roots
        directions = itertools.islice(itertools.cycle([roots, roots[::-1]]), self.hard_sweeps)
        count, converged = hard_sweeps(ascent, InnerProduct(), directions)
        stats = {"objective": ascent.objective(), "steps": len(values) - 1, "sweeps": count, "converged": converged}
        return ascent.alignment(repr(self), stats, problem.names)


def climb(ascent: Ascent) -> Iterator[float]:
    """Take one step after the other from soft couplings; yield the objective before each, and at the end.

    The objective is ``sum_(k < k') <U_k W_k, U_k' W_k'>`` over all tensors, weighted. It ends where no step gains.
    """
    while True:
        goal = _vertex(ascent)
        line = _line(ascent, goal)
        yield float(line(0.0)[0])
        step = line.highest()
        if step == 0:
            return
        ascent.couplings, ascent.inner = _between(ascent, goal, step)


def _vertex(ascent: Ascent) -> Ascent:
    """Maximise the linear model of the objective at the present couplings: permutations, as matrices."""
    goal = replace(ascent, couplings=_cloned(ascent.couplings), inner=_cloned(ascent.inner))
    for root in ascent.structure.roots:
        tree = ascent.structure.tree(root.name)
        if len(tree) == 1:
            pool = ascent.pool(root, InnerProduct())
            for k in ascent.moving:
                old = ascent.couplings[root.name][k - 1]
                goal.couplings[root.name][k - 1] = Definite().outside(root.name, k, pool.scores(k), old)
            continue
        for k in ascent.moving:
            scratch = replace(ascent, couplings=_cloned(ascent.couplings), inner=_cloned(ascent.inner))
            Tree(scratch, root, InnerProduct()).update(k, Definite())
            for space in tree:
                goal.couplings[space.name][k - 1] = scratch.couplings[space.name][k - 1]
                if space.parent is not None:
                    goal.inner[space.name][k - 1] = scratch.inner[space.name][k - 1]
    return goal


def _cloned(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in maps.items()}


def _between(ascent: Ascent, goal: Ascent, step: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The couplings at a share of the way: outer and inner ones on straight lines, whole ones as their products."""
    inner = {name: torch.lerp(plan, goal.inner[name], step) for name, plan in ascent.inner.items()}
    whole: dict[str, Tensor] = {}
    for space in ascent.structure.spaces:  # parents come first
        if space.parent is None:
            whole[space.name] = torch.lerp(ascent.couplings[space.name], goal.couplings[space.name], step)
        else:
            pairs = zip(whole[space.parent], inner[space.name], strict=True)
            whole[space.name] = torch.stack([unfold(outer, inside) for outer, inside in pairs])
    return whole, inner


def _line(ascent: Ascent, goal: Ascent) -> Line:
    """The objective between the present couplings and the goal."""
    structure, line = ascent.structure, Line()
    orders = {name: degree(structure, name) for name in ascent.stacks}
    maps = {t: Maps(*_between(ascent, goal, t)) for order in set(orders.values()) for t in nodes(order)}
    for name, stack in ascent.stacks.items():
        moved = [torch.cat([stack[:1], carried(stack[1:], structure, name, maps[t])]) for t in nodes(orders[name])]
        line.add(torch.stack(moved).flatten(2), ascent.weights[name])
    return line
