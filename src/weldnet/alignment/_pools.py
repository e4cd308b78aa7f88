"""Scores of one space, summed over the places where its units lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weldnet.affinity import Kernel, Pool
from weldnet.alignment._products import BrickPool
from weldnet.alignment._rough import Rough
from weldnet.alignment._seen import Seen, State
from weldnet.structure import Place, Space

__all__ = ["Entry", "Rebuilt", "SpacePool", "block_pool"]


@dataclass(frozen=True)
class Entry:
    """One place's share in the scores of its space.

    Args:
        place: where.
        weight: how much its tensor counts.
        pool: all networks' features there.
        inside: spaces whose inner couplings say how blocks are to be compared, where the axis depends on blocks.
    """

    place: Place
    weight: float
    pool: Pool
    inside: frozenset[str] = frozenset()


@dataclass
class SpacePool:
    """The pools of a space's places, weighted.

    Args:
        space: whose units are compared.
        entries: one for each of its places.
        device: where scores are to lie.
        seen: what earlier visits have computed; None if scores cannot be kept.
        marks: what the scores in a place depend on, as it is now; asked if there is ``seen``.
        rough: products in less than float32, if that is wanted of this space.
    """

    space: Space
    entries: list[Entry]
    device: torch.device
    seen: Seen | None = None
    marks: Callable[[Place], list[State]] = lambda place: []
    rough: Rough | None = None

    def scores(self, k: int) -> Tensor:
        """Return how well the units of network ``k`` fit the universe, shape (units, universe)."""
        if self.seen is None:
            return self._sum(k, self.entries)
        entries = {entry.place: entry for entry in self.entries}
        marks = {place: self.marks(place) for place in entries}
        return self.seen.total(marks, lambda places: self._sum(k, [entries[place] for place in places]))

    def _sum(self, k: int, entries: Sequence[Entry]) -> Tensor:
        if self.rough is None:
            return self._add(k, entries)
        rows = self.rough.rows(self.space.size, self.device)
        total = torch.zeros(self.space.size, self.space.size, device=self.device)
        expected = torch.zeros(len(rows), self.space.size, device=self.device)
        for entry in entries:
            if isinstance(entry.pool, BrickPool):
                scores, some = entry.pool.checked_scores(k, rows)
                total.add_(scores, alpha=entry.weight)
                if some is not None:
                    expected.add_(some, alpha=entry.weight)
        if not self.rough.is_near(total, rows, expected):
            self._be_exact(self.rough)
            return self._add(k, entries)
        return total.add_(self._add(k, [entry for entry in entries if not isinstance(entry.pool, BrickPool)]))

    def _add(self, k: int, entries: Sequence[Entry]) -> Tensor:
        total = torch.zeros(self.space.size, self.space.size, device=self.device)
        for entry in entries:
            total.add_(entry.pool.scores(k), alpha=entry.weight)
        return total

    def _be_exact(self, rough: Rough) -> None:
        rough.exact.add(self.space.name)
        self.rough = None
        for entry in self.entries:
            if isinstance(entry.pool, BrickPool):
                entry.pool.rough = None

    def split_scores(self, k: int, apart: Mapping[Place, str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores, and the sums over some of the places, by the names that ``apart`` gives them."""
        total = torch.zeros(self.space.size, self.space.size, device=self.device)
        parts: dict[str, Tensor] = {}
        for entry in self.entries:
            scores = entry.pool.scores(k)
            total.add_(scores, alpha=entry.weight)
            if entry.place in apart:
                part = parts.setdefault(apart[entry.place], torch.zeros_like(total))
                part.add_(scores, alpha=entry.weight)
        return total, parts

    def replace(self, k: int, coupling: Tensor, *, last: bool = False) -> None:
        """Give network ``k`` another coupling; ``last`` if no more scores are asked for."""
        for entry in self.entries:
            if not last or isinstance(entry.pool, BrickPool):  # whose sums go on to the next visit
                entry.pool.replace(k, coupling)


@dataclass
class Rebuilt:
    """A pool that holds no features: it is built anew, from the latest couplings, for every question.

    Args:
        build: makes the pool from the couplings of networks 1, 2, ...
        couplings: the latest ones; all places of a space share the list.
    """

    build: Callable[[Sequence[Tensor]], Pool]
    couplings: list[Tensor]

    def scores(self, k: int) -> Tensor:
        """Read, score and forget; see :class:`weldnet.affinity.Pool`."""
        return self.build(self.couplings).scores(k)

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        """Take in a coupling; features come fresh anyway."""
        self.couplings[k - 1] = coupling


def block_pool(kernel: Kernel, anchor: Tensor, rows: Tensor, couplings: Sequence[Tensor]) -> Pool:
    """Pool features that depend on the universe block which they are compared with.

    Args:
        kernel: how alike features are.
        anchor: the anchor's features, shape (units, d).
        rows: the other networks', shape (networks - 1, blocks, units, d).
        couplings: of the other networks: integer sources (universe,) or soft matrices (units, universe).
    """
    ours = anchor.reshape(rows.shape[1], -1, anchor.shape[-1])
    pools = [
        kernel.pool([own, *rows[:, u]], [_columns(c, u, len(own)) for c in couplings]) for u, own in enumerate(ours)
    ]
    return _BlockPool(pools, ours.shape[1])


@dataclass
class _BlockPool:
    """One pool for each universe block."""

    pools: list[Pool] = field(repr=False)
    block: int

    def scores(self, k: int) -> Tensor:
        return torch.cat([pool.scores(k) for pool in self.pools], dim=1)

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        for u, pool in enumerate(self.pools):
            pool.replace(k, _columns(coupling, u, self.block), None if rows is None else rows[u])


def _columns(coupling: Tensor, block: int, size: int) -> Tensor:
    return coupling[..., block * size : (block + 1) * size]
