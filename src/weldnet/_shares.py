"""What averaging weights and sizes must be. Free of torch, so that the command line can check them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from weldnet.errors import UsageError

__all__ = ["check_size", "check_weights"]


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise UsageError unless there is one finite weight of 0 or more for each network, and they sum to 1."""
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} networks; give one weight for each network")
    for weight in weights:
        if not math.isfinite(weight) or weight < 0:
            raise UsageError(f"weight {weight} is not a finite number of 0 or more; give shares such as 0.5")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        shares = [weight / total for weight in weights] if total else [1 / count] * count
        meant = ",".join(f"{share:.4g}" for share in shares)
        raise UsageError(f"the weights sum to {total:.6g}, not to 1; did you mean {meant}?")


def check_size(size: Any, networks: int) -> float:
    """Read the size of a fused network, in parents.

    Raises:
        UsageError: it is no number from 1 to the number of networks.
    """
    if isinstance(size, bool) or not isinstance(size, int | float) or not 1 <= size <= networks:
        raise UsageError(
            f"size is {size!r}; give a number from 1 (everything averaged) to {networks} (every parent kept whole)"
        )
    return float(size)
