"""Multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from weldnet.errors import UsageError


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        sizes: units of every layer, input and output included.
        bias: whether the layers have biases.

    Raises:
        UsageError: if there are fewer than two sizes, or one is below 1.
    """

    def __init__(self, sizes: Sequence[int], bias: bool = True):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UsageError(f"sizes {tuple(sizes)!r}: needs at least an input and an output size, all at least 1")
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList([nn.Linear(m, n, bias=bias) for m, n in pairs])

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch (N, ...) to logits (N, sizes[-1])."""
        x = x.flatten(1)
        for index, layer in enumerate(self.layers):
            x = layer(x if index == 0 else x.relu())
        return x


def mlp(sizes: Sequence[int] = (784, 400, 200, 100, 10), bias: bool = True) -> MLP:
    """Build a multilayer perceptron; the default fits 28x28 grey images and ten classes."""
    return MLP(sizes, bias)
