"""No alignment at all: what plain averaging does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from weldnet.alignment._method import Alignment, Problem
from weldnet.assignment import Permutation

__all__ = ["Identity"]


@final
@dataclass(frozen=True, kw_only=True)
class Identity:
    """Leave every unit where it is, so that fusing is the naive average.

    Right for networks that were trained from one common start; the control for all others.
    """

    name = "identity"
    order_invariant = True
    equivariant = False
    needs_data = False
    any_width = False

    def __call__(self, problem: Problem, /) -> Alignment:
        """Return identities for every network and space."""
        spaces = problem.structure.spaces
        couplings = {name: {s.name: Permutation.identity(s.size) for s in spaces} for name in problem.names}
        return Alignment(couplings, repr(self), {"converged": True})
