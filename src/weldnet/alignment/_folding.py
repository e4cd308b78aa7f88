"""Folding: the couplings that bring one network to fewer units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weldnet.alignment._method import Problem
from weldnet.alignment._pictures import Pictures, from_weights, next_root
from weldnet.assignment import Coupling, Permutation, Plan, cluster
from weldnet.errors import WidthError
from weldnet.structure import Space, Structure

__all__ = ["fold_couplings"]

_FROM, _INTO = "model", "into"


def fold_couplings(
    state: Mapping[str, Tensor], structure: Structure, target: Structure, *, seed: int = 0
) -> dict[str, Coupling]:
    """Group the units of every space that is narrower in the target, from the input to the output.

    Args:
        state: the network's tensors.
        structure: where its units lie.
        target: a corresponding structure of other widths.
        seed: of the groups' starts.

    Returns:
        A coupling for each space: a plan that brings whole units to their group, each weighted in the group's mean by
        the norm of what is read from it; a permutation where the widths are equal.

    Raises:
        WidthError: a space is wider in the target.
    """
    for space in structure.spaces:
        if target.space(space.name).size > space.size:
            raise WidthError(
                f"space {space.name!r} has {space.size} units in the network and {target.space(space.name).size} in "
                "the one that it is to be folded into; give one that is nowhere wider"
            )
    own = from_weights(Problem(structure, {_INTO: state, _FROM: state}))
    pictures = Pictures({_INTO: target, _FROM: structure}, own.tensors, {})
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Coupling] = {}
    roots = list(target.roots)
    while roots:
        root = next_root(pictures, roots, found)
        roots.remove(root)
        for space in target.tree(root.name):
            found[space.name] = _couple(pictures, space, structure.space(space.name), found, generator)
    return found


def _couple(
    pictures: Pictures, space: Space, wide: Space, done: Mapping[str, Coupling], generator: torch.Generator
) -> Coupling:
    if space.size == wide.size:
        return Permutation.identity(space.size)
    rows = pictures.features(_FROM, space, done)
    masses = _read_from(pictures, wide)
    labels = cluster(rows, space.size, masses, generator)
    values = torch.nn.functional.one_hot(labels, space.size).double() * masses[:, None]
    return Plan(values, masses, values.sum(0))


def _read_from(pictures: Pictures, space: Space) -> Tensor:
    """Return the norm of what all tensors read from every unit; a little where that is nothing."""
    reads = [
        pictures.rows(_FROM, i, {}).square().sum(1).cpu()
        for i, place in enumerate(pictures.universe.places)
        if place.space == space.name and place.role != "writes"
    ]
    total = torch.stack(reads).sum(0).sqrt() if reads else torch.ones(space.size, dtype=torch.float64)
    return total + 1e-6 * float(total.mean()) if float(total.mean()) else torch.ones_like(total)
