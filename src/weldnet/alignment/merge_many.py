"""MergeMany: every network in turn is matched to the mean of the others (Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._rebasin import start_weights
from weldnet.alignment._sweeps import hard_sweeps, random_orders
from weldnet.assignment import Permutation
from weldnet.errors import UsageError
from weldnet.structure import renumber

__all__ = ["MergeMany"]


@final
@dataclass(frozen=True, kw_only=True)
class MergeMany:
    """Match one network after the other, the first one too, to the mean of all others, until nobody moves.

    A match is weight matching between two networks. Each one that moves anything raises ``sum_(k < k') <W_k, W_k'>``,
    so that the rounds come to an end. Networks are taken in random order, spaces too.

    Args:
        rounds: over all networks, at most.
        sweeps: over all spaces in one match, at most.

    Source: Ainsworth et al., "Git Re-Basin", https://arxiv.org/abs/2209.04836, algorithm 3.
    """

    rounds: int = 100
    sweeps: int = 100
    name = "merge_many"
    order_invariant = False
    equivariant = False
    needs_data = False
    any_width = False

    def __post_init__(self) -> None:
        for option in ("rounds", "sweeps"):
            if getattr(self, option) < 1:
                raise UsageError(f"merge_many: {option} is {getattr(self, option)}; give 1 or more")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe is given in the order of the first."""
        whole, generator = start_weights(problem), torch.Generator().manual_seed(problem.seed)
        spaces, count = problem.structure.spaces, len(problem.names)
        couplings = [{s.name: Permutation.identity(s.size) for s in spaces} for _ in range(count)]
        rounds, settled = 0, False
        while not settled and rounds < self.rounds:
            rounds, settled = rounds + 1, True
            for k in torch.randperm(count, generator=generator).tolist():
                found = self._match(whole, k, generator)
                if all(p == Permutation.identity(len(p)) for p in found.values()):
                    continue
                settled = False
                couplings[k] = {s: p.after(couplings[k][s]) for s, p in found.items()}
                _renumber(whole, k, found)
        stats = {"objective": whole.objective(), "sweeps": rounds, "converged": settled}
        named = dict(zip(problem.names, couplings, strict=True))
        return Alignment(named, repr(self), stats).relative_to(problem.names[0])

    def _match(self, whole: Ascent, k: int, generator: torch.Generator) -> dict[str, Permutation]:
        """Match one network to the mean of the others as they lie."""
        stacks = {
            name: torch.stack([torch.cat([stack[:k], stack[k + 1 :]]).mean(0), stack[k]])
            for name, stack in whole.stacks.items()
        }
        pair = Ascent(whole.structure, ("mean", whole.names[k]), stacks, whole.weights)
        pair.stay()
        hard_sweeps(pair, InnerProduct(), random_orders(whole.structure.roots, self.sweeps, generator))
        return {space: Permutation(sources[0]) for space, sources in pair.couplings.items()}


def _renumber(whole: Ascent, k: int, found: Mapping[str, Permutation]) -> None:
    own = {name: stack[k] for name, stack in whole.stacks.items()}
    for name, tensor in renumber(own, whole.structure, {s: p.source for s, p in found.items()}).items():
        whole.stacks[name][k] = tensor
