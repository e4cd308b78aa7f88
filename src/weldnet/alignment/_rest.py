"""The spaces that a method's own evidence does not reach: matched by their weights, given all others."""

from __future__ import annotations

import itertools

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._sweeps import hard_sweeps
from weldnet.alignment._tree import Definite, Tree

__all__ = ["match_rest"]

_SWEEPS = 100


def match_rest(ascent: Ascent, rest: frozenset[str]) -> tuple[int, bool]:
    """Match some spaces by coordinate ascent on the inner product of weights; the others stay.

    Whole trees of such spaces start uniform, so that the numbering of the networks does not matter.

    Args:
        ascent: the networks, with hard couplings.
        rest: the spaces to match.

    Returns:
        The number of sweeps, and whether the last one moved nothing.
    """
    if not rest:
        return 0, True
    structure = ascent.structure
    roots = [root for root in structure.roots if any(space.name in rest for space in structure.tree(root.name))]
    whole = [root for root in roots if root.name in rest]
    spaces = [space for root in whole for space in structure.tree(root.name)]
    ascent.soften(spaces)
    for root in whole:
        tree = Tree(ascent, root, InnerProduct())
        for k in ascent.moving:
            tree.update(k, Definite())
    ascent.harden(spaces)
    sweeps, converged = hard_sweeps(ascent, InnerProduct(), itertools.repeat(roots, _SWEEPS), rest)
    return sweeps + 1, converged
