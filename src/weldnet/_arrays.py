"""Where tensors live, and how they get there."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import torch
from torch import Tensor

from weldnet.errors import UsageError

__all__ = ["find_device", "send", "state_home"]


def find_device(device: str | torch.device | None) -> torch.device | None:
    """Read a device and try it; None stays None. Where it says ``cuda``, the current one's number is added.

    Raises:
        UsageError: there is no such device here, or it is ``meta``, which holds no numbers.
    """
    if device is None:
        return None
    try:
        found = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise UsageError(_unusable(device, _why(error))) from error
    if found.type == "meta":
        raise UsageError(_unusable(device, "it holds no numbers"))
    return found


def _unusable(device: object, why: str) -> str:
    return f"device {str(device)!r} cannot be used here: {why}; give cpu, or leave it out"


def _why(error: Exception) -> str:
    """Say it shortly: PyTorch lists every device that there is, and every operation's."""
    if isinstance(error, NotImplementedError | ImportError):
        return "this PyTorch is not built for it"
    if str(error).startswith(("Expected one of", "Invalid device string")):
        return "there is none of that name"
    return textwrap.shorten(str(error).partition(". ")[0].rstrip("."), 120, placeholder="...")


def state_home(state: Mapping[str, Tensor]) -> torch.device | None:
    """Return where a network's tensors lie, by the first; None if it has none."""
    return next((tensor.device for tensor in state.values()), None)


def send(
    tensor: Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    copy: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Send a batch to a device, as ``Tensor.to`` does.

    To a GPU it goes from pinned memory: from there the GPU fetches it when its turn has come, and the CPU prepares the
    next one meanwhile. From ordinary memory the CPU would first wait for all that runs there.

    Args:
        tensor: on any device; not changed.
        device: where it is to go.
        dtype: of the result; its own if None.
        copy: give a copy also where nothing has to be changed.
        memory_format: of the result.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype, copy=copy, memory_format=memory_format)
    # Converted first: on its way a copy cannot be.
    ready = tensor.to(dtype=dtype or tensor.dtype, memory_format=memory_format)
    # Tensor.pin_memory keeps the strides, and cannot fill a tensor whose places share their memory (``expand``).
    return torch.empty_like(ready, pin_memory=True).copy_(ready).to(device, non_blocking=True)
