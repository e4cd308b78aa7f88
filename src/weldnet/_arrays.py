"""Where tensors live."""

from __future__ import annotations

import torch

from weldnet.errors import UsageError

__all__ = ["find_device"]


def find_device(device: str | torch.device | None) -> torch.device | None:
    """Read a device and try it; None stays None.

    Raises:
        UsageError: there is no such device here.
    """
    if device is None:
        return None
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UsageError(f"device {str(device)!r} cannot be used here: {why}; give cpu, or leave it out") from error
    return target
