"""All networks' values of one tensor side by side: as they enter scores, held or read from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weldnet._arrays import send
from weldnet.alignment._workspace import Workspace

__all__ = ["StoredStacks", "mean_square", "scaled_stack", "sum_of_squares"]

#: Sums in float64 are taken over pieces of this many numbers, so that no tensor is copied whole.
_PIECE = 1 << 20


@dataclass(frozen=True)
class StoredStacks(Mapping[str, Tensor]):
    """Stacks that are read when they are asked for, and not kept.

    Args:
        states: of the networks, which read their tensors from disk.
        target: where the stacks are to lie; the CPU if None.
        squares: mean square of every tensor over all networks.
        workspace: is told what was read.
    """

    states: Sequence[Mapping[str, Tensor]]
    target: torch.device | None
    squares: dict[str, float]
    workspace: Workspace

    @property
    def device(self) -> torch.device:
        """Where the stacks lie."""
        return self.target or torch.device("cpu")

    def nbytes(self, name: str) -> int:
        """Return how many bytes all networks' values of a tensor take on disk; 0 if nobody knows."""
        return sum(getattr(state, "size_of", lambda _: 0)(name) for state in self.states)

    def mean_square(self, name: str) -> float:
        """Return the mean square over all networks, read one after the other."""
        count, total = 0, 0.0
        for state in self.states:
            tensor = send(state[name], self.device, torch.float32)
            count, total = count + tensor.numel(), total + sum_of_squares(tensor)
        return total / count if count else 0.0

    def __getitem__(self, name: str) -> Tensor:
        tensors = [state[name] for state in self.states]
        self.workspace.read(sum(tensor.nbytes for tensor in tensors))
        return scaled_stack([send(tensor, self.device, torch.float32) for tensor in tensors], self.squares[name])

    def one(self, name: str, k: int) -> Tensor:
        """Return one network's values."""
        tensor = self.states[k][name]
        self.workspace.read(tensor.nbytes)
        return scaled_stack([send(tensor, self.device, torch.float32)], self.squares[name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.squares)

    def __len__(self) -> int:
        return len(self.squares)


def scaled_stack(tensors: Sequence[Tensor], square: float) -> Tensor:
    """Stack tensors in float32 and scale them to mean square 1, given their mean square."""
    stack = torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
    return stack.div_(square**0.5) if square else stack


def mean_square(tensors: Sequence[Tensor]) -> float:
    """Return the mean square over all numbers of some tensors."""
    count = sum(tensor.numel() for tensor in tensors)
    return sum(map(sum_of_squares, tensors)) / count if count else 0.0


def sum_of_squares(tensor: Tensor) -> float:
    """Return the sum of the squares of a tensor's numbers, in float64."""
    flat = tensor.reshape(-1)
    pieces = (flat[first : first + _PIECE].double().square().sum() for first in range(0, len(flat), _PIECE))
    return float(sum(pieces, torch.zeros((), dtype=torch.float64, device=tensor.device)))
