"""Models on the meta device: their tensors have shapes and no values, and capture needs no values."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NO_VALUE", "has_values", "has_weights", "memory", "off_meta", "standing_in", "twin_on_meta"]

#: What is raised where a value is read that there is not.
NO_VALUE = (DataDependentOutputException, DynamicOutputShapeException)


def has_weights(model: nn.Module) -> bool:
    """Whether every parameter and buffer has values, that is none is on the meta device."""
    return not any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, that is whether it is neither fake nor on the meta device."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def standing_in(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a model without weights run as if it had them; does nothing for one that has."""
    if has_weights(model):
        return contextlib.nullcontext()
    return _StandIns(itertools.chain(model.parameters(), model.buffers()))


def off_meta(leaf: Any) -> Any:
    """Return the CPU in place of the meta device, anything else as it is: rules run operations for real."""
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


def memory(tensor: Tensor) -> int:
    """Return what is the same for two tensors if and only if they share memory (or would, had they any)."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _StandIns(TorchDispatchMode):
    """Gives operations fake CPU tensors in place of weights and of whatever else is on the meta device.

    What depends on no weight (masks, positions, the inputs) is computed as ever, so that branches on it work; a value
    that depends on one cannot be read out of torch, because there is none.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights = {memory(t) for t in weights}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # the original too: numbers are object identities

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._replace, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _replace(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return off_meta(leaf)
        # Some weights of the model may have values: they count as having none, so that none can leave torch.
        return self._fake(leaf) if leaf.is_meta or memory(leaf) in self._weights else leaf

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._known:
            fake = FakeTensor(self._mode, twin_on_meta(tensor.detach()), torch.device("cpu"))
            self._known[id(tensor)] = (fake, tensor)
        return self._known[id(tensor)][0]


def twin_on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor, or parameter, of the same shape and dtype on the meta device."""
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
