"""Hard sweeps: space after space gets its best permutations, until nothing or little moves."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor

from weldnet.affinity import Kernel
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._tree import Best, Only, Rule, Tree, is_entangled
from weldnet.assignment import best_permutation, score_table, solve_table
from weldnet.structure import Space

__all__ = ["Assignments", "assign", "hard_sweeps", "random_orders", "strangers"]

#: Linear assignments at once.
_MOST = 4


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
    with Assignments.of(ascent) as assignments:
        for order in orders:
            sweeps += 1
            ascent.begin(f"sweep {sweeps}", order)
            moved = sum(assign(ascent, group, kernel, assignments, free) for group in strangers(ascent, order))
            converged = moved <= settled * units
            ascent.keep("hard", {"sweeps": sweeps, "converged": converged})
            if converged:
                return sweeps, True
    return sweeps, False


def strangers(ascent: Ascent, order: Sequence[Space]) -> Iterator[list[Space]]:
    """Cut an order of root spaces into runs in which no two share a tensor: visits there do not touch one another."""
    run: list[Space] = []
    near: set[str] = set()
    for root in order:
        if root.name in near:
            yield run
            run, near = [], set()
        run.append(root)
        near.update(ascent.near(root))
    if run:
        yield run


@final
class Assignments(AbstractContextManager["Assignments"]):
    """Linear assignments in other threads, while the scores of the next spaces are computed in this one.

    SciPy's solver leaves Python's lock alone. At most ``count`` run at once; the oldest is waited for when more come.
    Each needs its scores twice in float64, so that more than a few would need more memory than they save time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count)

    @staticmethod
    def of(ascent: Ascent) -> Assignments:
        """Return as many as torch may use threads, but a few; a single one beside tensors that are read from disk."""
        return Assignments(1 if ascent.workspace is not None else min(_MOST, torch.get_num_threads()))

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def solve(self, tables: Iterable[tuple[Space, Tensor]]) -> Iterator[tuple[Space, Tensor, Tensor]]:
        """Yield every space with its scores and its best permutation, in the order given."""
        waiting: deque[tuple[Space, Tensor, Future[Tensor]]] = deque()
        for space, scores in tables:
            here = scores.cpu()  # once, for the assignment and for what is made of it
            waiting.append((space, here, self._threads.submit(solve_table, score_table(here))))
            if len(waiting) > self.count:
                yield _solved(*waiting.popleft())
        while waiting:
            yield _solved(*waiting.popleft())


def _solved(space: Space, scores: Tensor, found: Future[Tensor]) -> tuple[Space, Tensor, Tensor]:
    return space, scores, found.result()


def random_orders(roots: Sequence[Space], count: int, generator: torch.Generator) -> Iterator[list[Space]]:
    """Yield the root spaces in ``count`` random orders."""
    for _ in range(count):
        yield [roots[i] for i in torch.randperm(len(roots), generator=generator).tolist()]


def assign(
    ascent: Ascent,
    group: Sequence[Space],
    kernel: Kernel,
    assignments: Assignments,
    free: frozenset[str] | None = None,
) -> int:
    """Give every network in turn the best hard couplings of some root spaces and what is nested in them, if ``free``.

    Args:
        ascent: the networks, with hard couplings.
        group: root spaces of which no two share a tensor.
        kernel: how alike features are.
        assignments: solves them.
        free: spaces that may move; all if None.

    Returns:
        How many units moved, of all networks together.
    """
    rule = kernel, None if free is None else frozenset(free)
    waiting = [root for root in group if not ascent.is_settled(root, rule)]
    trees = {root.name: ascent.structure.tree(root.name) for root in waiting}
    entangled = {name for name, tree in trees.items() if is_entangled(ascent.structure, tree)}
    flat = [root for root in waiting if len(trees[root.name]) == 1 and root.name not in entangled]
    # A pair's pools hold nothing; those of more networks may hold the features of all.
    together = max(1, len(flat)) if len(ascent.moving) == 1 else assignments.count + 1
    moved: dict[str, int] = {}
    for first in range(0, len(flat), together):
        moved |= _assign_flat(ascent, flat[first : first + together], kernel, assignments)
    for root in waiting:
        if root.name in moved:
            continue
        if len(trees[root.name]) == 1:
            moved[root.name] = _assign_entangled(ascent, root, kernel)
        else:
            moved[root.name] = _assign_tree(ascent, root, kernel, root.name in entangled, free)
    for root in waiting:
        if not moved[root.name]:
            ascent.settle(root, rule)
    return sum(moved.values())


def _assign_flat(ascent: Ascent, spaces: Sequence[Space], kernel: Kernel, assignments: Assignments) -> dict[str, int]:
    pools = {space.name: ascent.pool(space, kernel) for space in spaces}
    moved = dict.fromkeys(pools, 0)
    for k in ascent.moving:
        for space, scores, found in assignments.solve((space, pools[space.name].scores(k)) for space in spaces):
            old = ascent.couplings[space.name][k - 1].clone()
            source = found.to(old)
            if _improves(scores, source, old):
                moved[space.name] += int((source != old).sum())
                ascent.put(space.name, k, whole=source)
                pools[space.name].replace(k, source)
    return moved


def _assign_entangled(ascent: Ascent, space: Space, kernel: Kernel) -> int:
    """Assign a space that a tensor has on two axes, so that its scores hold only while one of them stays."""
    pool = ascent.pool(space, kernel)
    moved = 0
    for k in ascent.moving:
        scores = pool.scores(k)
        old = ascent.couplings[space.name][k - 1].clone()
        source = best_permutation(scores).to(old)
        if not _improves(scores, source, old):
            continue
        before = ascent.fit([space], kernel, k)
        ascent.put(space.name, k, whole=source)
        if _higher(ascent.fit([space], kernel, k), before):
            moved += int((source != old).sum())
            pool = ascent.pool(space, kernel)
        else:
            ascent.put(space.name, k, whole=old)
    return moved


def _assign_tree(ascent: Ascent, root: Space, kernel: Kernel, entangled: bool, free: frozenset[str] | None) -> int:
    tree = ascent.structure.tree(root.name)
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
