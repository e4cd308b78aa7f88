"""Activation matching: units that do the same on the same inputs are the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from weldnet.activations import Site
from weldnet.affinity import LIKENESSES, CrossMoments, Likeness
from weldnet.alignment._ascent import Ascent, start
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._rest import match_rest
from weldnet.alignment._tree import Best
from weldnet.assignment import as_blocks
from weldnet.errors import DataError, UsageError
from weldnet.structure import Place, Space, Structure

__all__ = ["ActivationMatching"]

_SIDES = {"outputs": ("output",), "inputs": ("input",), "both": ("output", "input")}


@final
@dataclass(frozen=True, kw_only=True)
class ActivationMatching:
    """Match units by what they do on unlabelled inputs: one linear assignment a space, on cross-correlations.

    ``A_k[a, u] = sum_layers corr(x_k[a], x_0[u])`` over samples and positions, summed over all layers that show the
    space: its channels among what a layer gives, or among what a linear layer or convolution reads. All sums come from
    one pass over the inputs, and every network is matched to the first one, so that the cost is linear in their number.
    Blocks of nested spaces are worth what the best assignment inside them is worth. Spaces that no layer shows (what is
    inside ``nn.MultiheadAttention``, say) are matched by their weights, given all others.

    Args:
        likeness: ``"correlation"``, ``"covariance"`` or ``"product"`` (the inner product) of activations. Units that do
            not vary correlate with nothing.
        look: at what layers give (``"outputs"``, before any nonlinearity), at what linear layers and convolutions read
            (``"inputs"``), or ``"both"``.
        samples: inputs to look at, at most.

    Source: Li et al., "Convergent Learning", https://arxiv.org/abs/1511.07543; Ainsworth et al., "Git Re-Basin",
    https://arxiv.org/abs/2209.04836, section 3.1.
    """

    likeness: Likeness = "correlation"
    look: Literal["outputs", "inputs", "both"] = "outputs"
    samples: int = 1024
    name = "activation_matching"
    order_invariant = False
    equivariant = True
    needs_data = True
    any_width = False

    def __post_init__(self) -> None:
        for option, allowed in (("likeness", LIKENESSES), ("look", tuple(_SIDES))):
            if getattr(self, option) not in allowed:
                given = getattr(self, option)
                raise UsageError(f"activation_matching: {option} is {given!r}; give {' or '.join(allowed)}")
        if self.samples < 2:
            raise UsageError(f"activation_matching: samples is {self.samples}; give 2 or more")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks to the first one."""
        structure, ascent = problem.structure, start(problem, "root")
        scores = self._scores(problem)
        shown = {s.name for s in structure.spaces if any(t.name in scores[1] for t in structure.tree(s.name))}
        for k in ascent.moving:
            for root in structure.roots:
                if root.name in shown:
                    _couple(ascent, root, k, scores[k])
        sweeps, converged = match_rest(ascent, frozenset(s.name for s in structure.spaces) - shown)
        stats = {"objective": ascent.objective(), "sweeps": 1 + sweeps, "converged": converged}
        return ascent.alignment(repr(self), stats, problem.names)

    def _scores(self, problem: Problem) -> dict[int, dict[str, Tensor]]:
        """Watch all networks in one pass; return every network's scores against the first one, by space."""
        observer = problem.observer(self.name)
        assert problem.data is not None
        places = {
            site: places for site, places in observer.places(problem.names[0]).items() if site[1] in _SIDES[self.look]
        }
        moments: dict[tuple[int, Place, Site], CrossMoments] = defaultdict(CrossMoments)
        for seen in observer.sites(problem.data, samples=self.samples):
            first, *others = (seen[name] for name in problem.names)
            for site in (site for site in places if site in first):
                for place in places[site]:
                    anchor = _units(first[site], problem.structure, place)
                    for k, other in enumerate(others, start=1):
                        moments[k, place, site].add(_units(other[site], problem.structure, place), anchor)
        scores: dict[int, dict[str, Tensor]] = {k: {} for k in range(1, len(problem.names))}
        for (k, place, site), known in moments.items():
            if known.samples < 2:
                raise DataError(
                    f"activation_matching: layer {site[0]!r} showed {known.samples} sample; one alone correlates with "
                    "nothing: give 2 inputs or more in data="
                )
            scores[k][place.space] = scores[k].get(place.space, 0) + known.scores(self.likeness)
        return scores


def _units(rows: Tensor, structure: Structure, place: Place) -> Tensor:
    """Pick the channels of a space's units; copies of a unit are further samples. Shape (rows x copies, units)."""
    index = torch.as_tensor(structure.positions(place), device=rows.device)
    return rows[:, index].transpose(1, 2).flatten(0, 1)


def _couple(ascent: Ascent, root: Space, k: int, scores: Mapping[str, Tensor]) -> None:
    """Give network ``k`` the best couplings of a root space and what is nested in it, from the leaves up."""
    above: dict[str, Tensor] = {}
    for space in ascent.structure.tree(root.name)[::-1]:
        total = scores.get(space.name)
        if total is None:
            total = torch.zeros(space.size, space.size, dtype=torch.float64, device=ascent.device)
        total = total.to(ascent.device) + above.get(space.name, 0)
        if space.parent is None:
            ascent.couple(root, k, Best().outside(space.name, k, total, ascent.couplings[space.name][k - 1]))
            return
        inner = ascent.inner[space.name]
        found, values = Best().inside(space.name, k, as_blocks(total, inner.shape[1]), inner[k - 1])
        inner[k - 1] = found
        above[space.parent] = above.get(space.parent, 0) + values
