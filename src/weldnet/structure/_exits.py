"""Ways out of torch, along which a value is no longer seen by those who record operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Exits"]

_EXITS: dict[Any, str] = {
    getattr(Tensor, name): name for name in ("numpy", "__array__", "__dlpack__", "tolist", "data_ptr")
}


class Exits(TorchFunctionMode):
    """Lets values out of torch, unless they depend on weights.

    While operations are recorded, tensors are wrapped, and what leaves them of itself is not even their values.

    Args:
        depends: whether a tensor depends on weights.
    """

    def __init__(self, depends: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._depends = depends
        self._refusal = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _EXITS and args:
            tensor = _unwrapped(args[0])
            if self._depends(tensor):
                self._refusal = self._refusal or f".{_EXITS[func]}() takes values that depend on weights out of torch"
                self.refuse()
            args = (tensor, *args[1:])
        return func(*args, **(kwargs or {}))

    def refuse(self) -> None:
        """Raise RuntimeError if a value that depends on weights was asked for, even if the model went on without it."""
        if self._refusal:
            raise RuntimeError(self._refusal)


def _unwrapped(tensor: Tensor) -> Tensor:
    while torch._is_functional_tensor(tensor):  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        torch._sync(tensor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        tensor = torch._from_functional_tensor(tensor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return tensor
