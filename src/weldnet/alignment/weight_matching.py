"""Weight matching: coordinate ascent on the inner product of weights (Git Re-Basin)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch

from weldnet.affinity import InnerProduct
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._rebasin import first_pass, start_weights
from weldnet.alignment._sweeps import hard_sweeps, random_orders
from weldnet.errors import UsageError

__all__ = ["WeightMatching"]


@final
@dataclass(frozen=True, kw_only=True)
class WeightMatching:
    """Maximise ``sum_layers <W_l^A, P_l W_l^B P_(l-1)^T>`` over permutations, one space at a time.

    Parameters count, by their values; buffers, such as BatchNorm's running statistics, do not.

    Takes the spaces in random order, one linear assignment each, until a whole sweep moves nothing. For two networks
    the sweeps start from one pass in the network's order, where every space is matched by the tensors whose other units
    are matched already; from the identity, as the paper does, where that has the higher objective. With more networks
    they start from the identity, the objective is summed over all pairs, and every network but the first is matched in
    turn, so that the couplings are cycle-consistent.

    Args:
        sweeps: at most, not counting the pass at the start.
        begin: ``"pass"``, or ``"identity"``: the paper's algorithm to the letter.

    Source: Ainsworth et al., "Git Re-Basin", https://arxiv.org/abs/2209.04836, algorithm 1; the start is ours
    (``docs/results/weight-matching.md``).
    """

    sweeps: int = 100
    begin: Literal["pass", "identity"] = "pass"
    name = "weight_matching"
    order_invariant = False
    equivariant = False
    needs_data = False
    any_width = False

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise UsageError(f"weight_matching: sweeps is {self.sweeps!r}; give 1 or more")
        if self.begin not in ("pass", "identity"):
            raise UsageError(f"weight_matching: begin is {self.begin!r}; give pass or identity")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks to the first one."""
        ascent = start_weights(problem)
        if self.begin == "pass" and ascent.resume("hard") is None:
            first_pass(ascent)
            ascent.keep("hard", {"sweeps": 0, "converged": False})
        generator = torch.Generator().manual_seed(problem.seed)
        orders = random_orders(problem.structure.roots, self.sweeps, generator)
        count, converged = hard_sweeps(ascent, InnerProduct(), orders)
        stats = {"objective": ascent.objective(), "sweeps": count, "converged": converged}
        return ascent.alignment(repr(self), stats, problem.names)
