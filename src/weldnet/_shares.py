"""What averaging weights must be. Free of torch, so that the command line can check them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weldnet.errors import UsageError

__all__ = ["check_weights"]


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
