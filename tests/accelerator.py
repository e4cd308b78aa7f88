"""A device that is not here: tensors that say they are elsewhere, refuse to be mixed with the CPU's, and compute.

Their values lie in tensors of the CPU, so that everything runs and results can be compared. What torch refuses on a
real GPU is refused here: an operation between tensors of both devices, but for copies, single numbers and indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Accelerator", "Far", "MixedDevicesError"]

DEVICE = torch.device("lazy", 0)
_MAY_MIX = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_CPU_INDICES = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
_WORK = {
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "convolution")
}


class MixedDevicesError(RuntimeError):
    """An operation met tensors of both devices."""


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
    """

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Send to the device what is asked to be there."""
        if func in _WORK:
            far = any(isinstance(leaf, Far) for leaf in pytree.tree_leaves((args, kwargs)))
            self.here, self.there = self.here + (not far), self.there + far
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = any(isinstance(tensor, Far) for tensor in tensors)
    if far and func not in _MAY_MIX:
        checked = [args[0]] if func in _CPU_INDICES else tensors
        for tensor in checked:
            if not isinstance(tensor, Far) and tensor.dim():
                raise MixedDevicesError(f"{func} meets a tensor of the CPU, of shape {tuple(tensor.shape)}")
    asked = kwargs.get("device")
    wanted = far if asked is None else torch.device(asked).type == DEVICE.type
    if wanted:
        kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    own = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, Far)}
    near_args, near_kwargs = pytree.tree_map(lambda t: t.near if isinstance(t, Far) else t, (args, kwargs))
    found = func(*near_args, **near_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not wanted:
        return found
    return pytree.tree_map(lambda t: own.get(id(t)) if id(t) in own else Far(t) if isinstance(t, Tensor) else t, found)
