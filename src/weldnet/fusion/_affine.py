"""Affine layers as matrices: what they read as rows, and their weights as what those rows are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

__all__ = ["read_matrix", "read_rows", "row_width", "write_matrix"]


def read_matrix(module: nn.Module) -> Tensor:
    """Return an affine layer's weight as a matrix a group: shape (groups, inputs x kernel, outputs of a group).

    A row of :func:`read_rows` times it is the layer's output without the bias.
    """
    weight = _weight(module)
    if isinstance(module, _ConvTransposeNd):
        flipped = weight.flip(list(range(2, weight.dim())))
        return flipped.movedim(1, -1).reshape(1, -1, weight.shape[1])
    if isinstance(module, _ConvNd):
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1).transpose(1, 2)
    return (weight.T if isinstance(module, nn.Linear) else weight)[None]


def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Give a layer the weight that :func:`read_matrix` would return as ``matrix``."""
    weight = _weight(module)
    if isinstance(module, _ConvTransposeNd):
        inputs, outputs, *kernel = weight.shape
        found = matrix.reshape(inputs, *kernel, outputs).movedim(-1, 1).flip(list(range(2, weight.dim())))
    elif isinstance(module, _ConvNd):
        found = matrix.transpose(1, 2).reshape(weight.shape)
    else:
        found = matrix[0].T if isinstance(module, nn.Linear) else matrix[0]
    with torch.no_grad():
        weight.copy_(found)


def row_width(module: nn.Module) -> int:
    """Return how many numbers a row has in one group."""
    return read_matrix(module).shape[1]


def read_rows(module: nn.Module, given: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Unfold what an affine layer is given: one row a sample and position of its output, in their order.

    Args:
        module: a linear layer, a convolution, or a transposed convolution without groups.
        given: its input.
        chosen: which rows; all of them if None.

    Returns:
        Shape (rows, groups, inputs x kernel).
    """
    if not isinstance(module, _ConvNd):
        rows = given.reshape(-1, 1, given.shape[-1])
        return rows if chosen is None else rows[chosen]
    spatial = len(module.kernel_size)
    given = given if given.dim() == spatial + 2 else given[None]
    padded, stride = _stuffed(module, given) if isinstance(module, _ConvTransposeNd) else _padded(module, given)
    windows = padded
    for axis, (size, step, gap) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True), start=2):
        windows = windows.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    windows = windows.movedim(1, spatial + 1)  # (samples, positions ..., channels, kernel ...)
    positions = windows.shape[: spatial + 1]
    if chosen is None:
        rows = windows.reshape(math.prod(positions), -1)
    else:
        rows = windows[_unravelled(chosen, positions)].flatten(1)
    return rows.reshape(len(rows), module.groups, -1)


def _unravelled(numbers: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """As ``torch.unravel_index``, which copies the sizes to the device and waits for that."""
    found: list[Tensor] = []
    for size in reversed(sizes):
        found.insert(0, numbers % size)
        numbers = numbers // size
    return tuple(found)


def _padded(module: _ConvNd, given: Tensor) -> tuple[Tensor, Sequence[int]]:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(given, list(module._reversed_padding_repeated_twice), mode), module.stride  # pyright: ignore


def _stuffed(module: _ConvTransposeNd, given: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input on whose windows the flipped kernel is an ordinary convolution: zeros between, borders around."""
    sizes = [(n - 1) * s + 1 for n, s in zip(given.shape[2:], module.stride, strict=True)]
    stuffed = given.new_zeros(*given.shape[:2], *sizes)
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in module.stride))] = given
    border: list[int] = []
    shape = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    for size, gap, padding, extra in reversed(list(shape)):
        around = gap * (size - 1) - int(padding)
        border += [around, around + extra]
    return functional.pad(stuffed, border), [1] * len(module.stride)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
