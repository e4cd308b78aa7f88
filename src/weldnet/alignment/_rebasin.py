"""What Git Re-Basin's methods have in common: which tensors count, and where their sweeps start."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from weldnet.affinity import InnerProduct, Kernel
from weldnet.alignment._ascent import Ascent, start
from weldnet.alignment._method import Problem
from weldnet.alignment._pools import SpacePool
from weldnet.alignment._sweeps import Assignments, assign, strangers
from weldnet.structure import Place, Space

__all__ = ["first_pass", "start_weights"]


def start_weights(problem: Problem) -> Ascent:
    """Stack the networks' tensors with identity couplings; parameters count by their values, buffers do not count.

    Among raw values BatchNorm's running statistics would outweigh all weights. A buffer counts where a space that it
    lies in has no parameter at all.
    """
    ascent, structure = start(problem, "raw"), problem.structure
    learned = {place.space for place in structure.places if place.tensor not in structure.buffers}
    for name in structure.buffers:
        if all(place.space in learned for place in structure.places_in(name)):
            ascent.weights[name] = 0.0
    return ascent


def first_pass(ascent: Ascent) -> bool:
    """Match every root space once, in the structure's order, by the tensors whose other units are matched already.

    In networks that have nothing to do with each other, units of the same number are alike by chance only: tensors that
    lead to spaces not yet visited would add noise. What was found is kept if the objective is above that of the
    identity, as it is not where the networks have stayed in one order. More than two networks stay as they are: a space
    would be compared with networks that are not matched either (``docs/results/weight-matching.md``).

    Args:
        ascent: the networks, with identity couplings; they stay if they are better.

    Returns:
        Whether the pass was kept.
    """
    if len(ascent.names) > 2:
        return False
    roots = ascent.structure.roots
    ascent.begin("what the identity is worth", roots)
    before = ascent.objective()
    known = _Known(
        ascent.structure, ascent.names, ascent.stacks, ascent.weights, ascent.couplings, ascent.inner, ascent.workspace
    )
    ascent.begin("first pass", roots)
    with Assignments.of(ascent) as assignments:
        for group in strangers(ascent, roots):
            known.visited |= {space.name for root in group for space in ascent.structure.tree(root.name)}
            assign(known, group, InnerProduct(), assignments)
    ascent.begin("what the first pass is worth", roots)
    if ascent.objective() > before:
        return True
    ascent.stay()
    return False


@dataclass
class _Known(Ascent):
    """An ascent whose scores leave out the tensors that lead to spaces not visited yet."""

    visited: Set[str] = frozenset()

    def pool(self, space: Space, kernel: Kernel) -> SpacePool:
        """Put together how all networks' units fit the universe, over the places that count."""
        found = super().pool(space, kernel)
        found.seen = None  # every space is visited once
        found.entries = [entry for entry in found.entries if self._counts(entry.place)]
        return found

    def _counts(self, place: Place) -> bool:
        others = (p for p in self.structure.places_in(place.tensor) if (p.axes, p.view) != (place.axes, place.view))
        return all(other.space in self.visited for other in others)
