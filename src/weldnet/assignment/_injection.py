"""Injections: couplings into a universe of more units, each unit to one of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from weldnet.assignment._coupling import Coupling, Permutation, Plan
from weldnet.errors import AlignmentError

__all__ = ["injection", "targets_of"]


def injection(targets: Tensor, units: int) -> Plan:
    """Return the plan that brings unit ``a`` of a network to universe unit ``targets[a]`` of ``units``.

    Its rows sum to 1; its columns sum to 1 where the universe unit is one of the network's, and to 0 elsewhere.

    Example:
        >>> import torch
        >>> injection(torch.tensor([2, 0]), 3).values
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    values = torch.zeros(len(targets), units)
    values[torch.arange(len(targets)), targets] = 1
    return Plan(values, columns=values.sum(0))


def targets_of(coupling: Coupling) -> Tensor:
    """Return the universe unit of each of a network's units, integers of shape (units,).

    Raises:
        AlignmentError: the coupling is neither a permutation nor an injection.
    """
    if isinstance(coupling, Permutation):
        return coupling.inverse().source
    values = coupling.values if isinstance(coupling, Plan) else None
    hard = values is not None and bool(((values == 0) | (values == 1)).all())
    if values is None or not hard or not bool((values.sum(1) == 1).all()) or not bool((values.sum(0) <= 1).all()):
        raise AlignmentError(
            f"a {type(coupling).__name__} that shares units out is no injection; give permutations, or plans that "
            "bring each unit to one of its own"
        )
    return values.argmax(1)
