"""Weight matching: coordinate ascent on the inner product of weights (Git Re-Basin)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import start
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._sweeps import hard_sweeps, random_orders
from weldnet.errors import UsageError

__all__ = ["WeightMatching"]


@final
@dataclass(frozen=True, kw_only=True)
class WeightMatching:
    """Maximise ``sum_layers <W_l^A, P_l W_l^B P_(l-1)^T>`` over permutations, one space at a time.

    Starts from the identity and takes the spaces in random order, one linear assignment each, until a whole sweep
    moves nothing. With more than two networks the objective is summed over all pairs and every network but the
    first is matched in turn, so that the couplings are cycle-consistent.

    Args:
        sweeps: at most.

    Source: Ainsworth et al., "Git Re-Basin", https://arxiv.org/abs/2209.04836, algorithm 1.
    """

    sweeps: int = 100
    name = "weight_matching"
    order_invariant = False
    equivariant = False
    needs_data = False
    any_width = False

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise UsageError(f"weight_matching: sweeps is {self.sweeps}; give 1 or more")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks to the first one."""
        ascent = start(problem, "raw")
        generator = torch.Generator().manual_seed(problem.seed)
        orders = random_orders(problem.structure.roots, self.sweeps, generator)
        count, converged = hard_sweeps(ascent, InnerProduct(), orders)
        stats = {"objective": ascent.objective(), "sweeps": count, "converged": converged}
        return ascent.alignment(repr(self), stats, problem.names)
