"""The repairs by name."""

from __future__ import annotations

from torch import nn

from weldnet.errors import UsageError
from weldnet.fusion._auto import Auto
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics
from weldnet.fusion._protocol import NoRepair, Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._rescale import Rescale

__all__ = ["REPAIRS", "make_repair"]

REPAIRS = ("auto", "none", "data", "refit")


def make_repair(repair: str | Repair, model: nn.Module) -> Repair:
    """Return the repair of that name.

    Raises:
        UsageError: an unknown name; the message lists the known ones.
    """
    if not isinstance(repair, str):
        if isinstance(repair, type) or not callable(repair):
            raise UsageError(f"repair is {repair!r}; give {', '.join(REPAIRS)}, or an object such as Refit()")
        return repair
    if repair == "auto":
        return Auto()
    if repair == "none":
        return NoRepair()
    if repair == "data":
        return BatchNormReset() if has_statistics(model) else Rescale()
    if repair == "refit":
        return Refit()
    raise UsageError(f"unknown repair {repair!r}; weldnet has {', '.join(REPAIRS)}")
