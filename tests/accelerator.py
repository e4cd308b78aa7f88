"""A device that is not here: tensors that say they are elsewhere, refuse to be mixed with the CPU's, and compute.

Their values lie in tensors of the CPU, so that everything runs and results can be compared. What torch refuses on a
real GPU is refused here: an operation between tensors of both devices, but for copies, single numbers and indices;
reading as NumPy; and a random generator of the other device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Accelerator", "Copy", "Far", "MixedDevicesError", "is_far"]

DEVICE = torch.device("lazy", 0)
_ATEN = torch.ops.aten
_MAY_MIX = {_ATEN._to_copy.default, _ATEN.copy_.default}
_CPU_INDICES = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default}
_WORK = {getattr(_ATEN, name).default for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "convolution")}
#: Operations whose result the CPU waits for: a number, a shape that depends on values.
_ANSWERS = {_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default}


class MixedDevicesError(RuntimeError):
    """An operation met tensors of both devices."""


@dataclass(frozen=True)
class Copy:
    """A tensor that went from one device to the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_index(self) -> bool:
        """Whether it holds positions or truth values, no numbers of a network."""
        return not self.dtype.is_floating_point


class Far(Tensor):
    """A tensor on the device that is not here."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        """Wrap a tensor of the CPU."""
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, near.size(), near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is active, ``lazy`` is a device: tensors can be made there and sent there.

    Attributes:
        here: how many matrix products and convolutions ran on the CPU.
        there: how many on the device.
        sent: the tensors that were copied to the device, single numbers apart.
        fetched: those that were copied back, single numbers apart.
        asked: how often the CPU waited for a single number, or for a shape that depends on values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there, self.asked = 0, 0, 0
        self.sent: list[Copy] = []
        self.fetched: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Send to the device what is asked to be there."""
        tensors = _tensors(args, kwargs or {})
        far = any(isinstance(tensor, Far) for tensor in tensors)
        if func in _WORK:
            self.here, self.there = self.here + (not far), self.there + far
        found = _run(func, args, kwargs or {})
        if func in _MAY_MIX:
            target, source = (args[0], args[1]) if func is _ATEN.copy_.default else (found, args[0])
            self._note(source, target)
        elif far and (func in _ANSWERS or _has_mask(func, args)):
            self.asked += 1
        return found

    def _note(self, source: Any, target: Any) -> None:
        if isinstance(source, Far) != isinstance(target, Far):
            if source.dim():
                copies = self.fetched if isinstance(source, Far) else self.sent
                copies.append(Copy(tuple(source.shape), source.dtype))
            else:
                self.asked += isinstance(source, Far)


def is_far(things: nn.Module | Iterable[Tensor]) -> bool:
    """Whether all of a module's tensors, or all given ones, are on the device."""
    tensors = list(things.state_dict().values() if isinstance(things, nn.Module) else things)
    return bool(tensors) and all(isinstance(tensor, Far) for tensor in tensors)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors(args, kwargs)
    far = any(isinstance(tensor, Far) for tensor in tensors)
    if far and func not in _MAY_MIX:
        _refuse_mixture(func, args, tensors)
    asked = kwargs.get("device")
    wanted = far if asked is None else torch.device(asked).type == DEVICE.type
    _refuse_generator(func, args, kwargs, wanted)
    if wanted:
        kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    own = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, Far)}
    near_args, near_kwargs = pytree.tree_map(lambda t: t.near if isinstance(t, Far) else t, (args, kwargs))
    found = func(*near_args, **near_kwargs)
    if func is _ATEN.copy_.default:
        return args[0]
    if not wanted:
        return found
    return pytree.tree_map(lambda t: own.get(id(t)) if id(t) in own else Far(t) if isinstance(t, Tensor) else t, found)


def _refuse_mixture(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """As torch: elementwise operations take single numbers from the CPU, but do not write to them."""
    checked = tensors
    if func in _CPU_INDICES:
        checked = [args[0], *(args[2:3] if len(args) > 2 and isinstance(args[2], Tensor) else [])]
    single = torch.Tag.pointwise in func.tags or func in _CPU_INDICES
    written = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
    for tensor in checked:
        if not isinstance(tensor, Far) and (tensor.dim() or not single or tensor is written):
            shape = tuple(tensor.shape)
            raise MixedDevicesError(f"{func}: expected all tensors on the same device, found one of the CPU, {shape}")


def _refuse_generator(func: Any, args: Any, kwargs: dict[str, Any], wanted: bool) -> None:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Generator) and (leaf.device.type == DEVICE.type) != wanted:
            raise MixedDevicesError(f"{func}: expected a generator of the tensor's device, found {leaf.device}")


def _has_mask(func: Any, args: Any) -> bool:
    """Whether an operation picks by truth values on the device, whose number the CPU must know."""
    if func not in _CPU_INDICES:
        return False
    return any(isinstance(t, Far) and t.dtype == torch.bool for t in args[1])


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
