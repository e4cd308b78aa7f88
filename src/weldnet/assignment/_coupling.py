"""Couplings: who maps to whom in one space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weldnet.errors import AlignmentError

__all__ = ["Permutation"]


@final
@dataclass(frozen=True, eq=False)
class Permutation:
    """A one-to-one coupling: universe unit ``u`` is the network's unit ``source[u]``.

    Args:
        source: integers of shape (units,), each of 0 .. units-1 once.

    Raises:
        AlignmentError: ``source`` is not a permutation.

    Example:
        >>> import torch
        >>> Permutation(torch.tensor([2, 0, 1])).inverse().source
        tensor([1, 2, 0])
    """

    source: Tensor

    def __post_init__(self) -> None:
        # A copy: later changes of the caller's tensor must not undo the check.
        source = self.source.detach().to("cpu", torch.int64, copy=True)
        whole = not self.source.is_floating_point()
        if not whole or source.dim() != 1 or not torch.equal(source.sort().values, torch.arange(len(source))):
            got = ", ".join(str(value) for value in self.source.flatten()[:8].tolist())
            raise AlignmentError(
                f"a permutation of shape (units,) holds each of 0..{source.numel() - 1} once, as integers; "
                f"got shape {tuple(source.shape)}: {got}{', ...' if source.numel() > 8 else ''}"
            )
        object.__setattr__(self, "source", source)

    @staticmethod
    def identity(units: int) -> Permutation:
        """Return the coupling that leaves every unit where it is."""
        return Permutation(torch.arange(units))

    def __len__(self) -> int:
        return len(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and torch.equal(self.source, other.source)

    def __hash__(self) -> int:
        return hash(tuple(self.source.tolist()))

    def inverse(self) -> Permutation:
        """Return the coupling from the universe back to the network."""
        return Permutation(torch.argsort(self.source))

    def after(self, first: Permutation) -> Permutation:
        """Return the coupling of a network that was renumbered by ``first`` and then by this one."""
        return Permutation(first.source[self.source])

    @property
    def moved(self) -> float:
        """The share of units that change their number."""
        if not len(self):
            return 0.0
        return float((self.source != torch.arange(len(self))).double().mean())

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the coupling as a 0/1 matrix of shape (network units, universe units)."""
        matrix = torch.zeros(len(self), len(self), dtype=dtype)
        matrix[self.source, torch.arange(len(self))] = 1
        return matrix
