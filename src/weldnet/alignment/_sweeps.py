"""Hard sweeps: space after space gets its best permutations, until nothing or little moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from weldnet.affinity import Kernel
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._tree import Best, Only, Rule, Tree, is_entangled
from weldnet.assignment import best_permutation
from weldnet.structure import Space

__all__ = ["assign", "hard_sweeps", "random_orders"]


def hard_sweeps(
    ascent: Ascent,
    kernel: Kernel,
    orders: Iterable[Sequence[Space]],
    free: frozenset[str] | None = None,
    *,
    settled: float = 0.0,
) -> tuple[int, bool]:
    """Assign space after space until a whole sweep moves nothing, or little.

    Args:
        ascent: the networks, with hard couplings.
        kernel: how alike features are.
        orders: the root spaces to visit, sweep by sweep.
        free: spaces that may move; all if None.
        settled: the share of all networks' units that a sweep must move for another one to follow.

    Returns:
        The number of sweeps, and whether the last one moved no more than that.
    """
    sweeps, units = 0, len(ascent.moving) * sum(space.size for space in ascent.structure.spaces)
    if (kept := ascent.resume("hard")) is not None:
        sweeps, converged = int(kept["sweeps"]), bool(kept["converged"])
        if converged:
            return sweeps, True
        orders = itertools.islice(orders, sweeps, None)
    for order in orders:
        sweeps += 1
        ascent.begin(f"sweep {sweeps}", order)
        moved = sum(assign(ascent, root, kernel, free) for root in order)
        converged = moved <= settled * units
        ascent.keep("hard", {"sweeps": sweeps, "converged": converged})
        if converged:
            return sweeps, True
    return sweeps, False


def random_orders(roots: Sequence[Space], count: int, generator: torch.Generator) -> Iterator[list[Space]]:
    """Yield the root spaces in ``count`` random orders."""
    for _ in range(count):
        yield [roots[i] for i in torch.randperm(len(roots), generator=generator).tolist()]


def assign(ascent: Ascent, root: Space, kernel: Kernel, free: frozenset[str] | None = None) -> int:
    """Give every network in turn the best hard couplings of a root space and what is nested in it, if ``free``.

    Returns:
        How many units moved, of all networks together.
    """
    rule = kernel, None if free is None else frozenset(free)
    if ascent.is_settled(root, rule):
        return 0
    moved = _assign(ascent, root, kernel, free)
    if not moved:
        ascent.settle(root, rule)
    return moved


def _assign(ascent: Ascent, root: Space, kernel: Kernel, free: frozenset[str] | None) -> int:
    tree = ascent.structure.tree(root.name)
    entangled = is_entangled(ascent.structure, tree)
    if len(tree) == 1:
        return _assign_flat(ascent, root, kernel, entangled)
    pools = Tree(ascent, root, kernel)
    allowed = [space.name for space in tree if free is None or space.name in free]
    best = Only(Best(), frozenset(allowed))
    moved = 0
    for k in ascent.moving:
        if not entangled:
            old = _snapshot(ascent, tree, k)
            pools.update(k, best)
            moved += _moved(ascent, old, k)
            continue
        for rule in (best, *(Only(Best(), frozenset({name})) for name in allowed)):
            if climbed := _climbs(ascent, root, kernel, pools, rule, k):
                moved += climbed
                break
            pools = Tree(ascent, root, kernel)
    return moved


def _assign_flat(ascent: Ascent, space: Space, kernel: Kernel, entangled: bool) -> int:
    pool = ascent.pool(space, kernel)
    moved = 0
    for k in ascent.moving:
        scores = pool.scores(k)
        old = ascent.couplings[space.name][k - 1].clone()
        source = best_permutation(scores).to(old)
        if not _improves(scores, source, old):
            continue
        units = int((source != old).sum())
        if not entangled:
            moved += units
            ascent.put(space.name, k, whole=source)
            pool.replace(k, source)
            continue
        before = ascent.fit([space], kernel, k)
        ascent.put(space.name, k, whole=source)
        if _higher(ascent.fit([space], kernel, k), before):
            moved += units
            pool = ascent.pool(space, kernel)
        else:
            ascent.put(space.name, k, whole=old)
    return moved


def _improves(scores: Tensor, source: Tensor, old: Tensor) -> bool:
    """Whether a new coupling raises the scores by more than float32 can tell: else moving would only cycle."""
    universe, table = torch.arange(len(source)), scores.double().cpu()
    gain = float(table[source.cpu(), universe].sum() - table[old.cpu(), universe].sum())
    return gain > 1e-6 * float(table.abs().amax(0).sum())


def _climbs(ascent: Ascent, root: Space, kernel: Kernel, pools: Tree, rule: Rule, k: int) -> int:
    """Move network ``k`` if that really is better; else leave it where it was. Return how many units moved.

    Where a tensor has two axes in one tree, the scores hold only while the other axis stays. Moving both by them could
    go down, and cycle.
    """
    tree = ascent.structure.tree(root.name)
    old, before = _snapshot(ascent, tree, k), ascent.fit(tree, kernel, k)
    pools.update(k, rule)
    moved = _moved(ascent, old, k)
    if moved and _higher(ascent.fit(tree, kernel, k), before):
        return moved
    for name, value in old[0].items():
        ascent.put(name, k, whole=value, inside=old[1].get(name))
    return 0


def _higher(after: float, before: float) -> bool:
    return after > before + 1e-6 * abs(before)


#: One network's couplings and inner couplings in a tree.
_State = tuple[dict[str, Tensor], dict[str, Tensor]]


def _snapshot(ascent: Ascent, tree: Sequence[Space], k: int) -> _State:
    couplings = {space.name: ascent.couplings[space.name][k - 1].clone() for space in tree}
    return couplings, {s.name: ascent.inner[s.name][k - 1].clone() for s in tree if s.parent is not None}


def _moved(ascent: Ascent, old: _State, k: int) -> int:
    """Count the units that moved; at least 1 if only what an inner coupling says of uncoupled blocks has changed."""
    whole, inner = old
    moved = sum(int((ascent.couplings[name][k - 1] != value).sum()) for name, value in whole.items())
    return moved or int(any(not torch.equal(ascent.inner[name][k - 1], value) for name, value in inner.items()))
