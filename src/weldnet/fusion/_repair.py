"""The repairs by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from weldnet.errors import UsageError
from weldnet.fusion._auto import Auto
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics
from weldnet.fusion._calibrate import Calibrate
from weldnet.fusion._chain import Chain
from weldnet.fusion._protocol import NoRepair, Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._rescale import Rescale
from weldnet.fusion._synthetic import Synthetic
from weldnet.fusion._weights import WeightNorms

__all__ = ["REPAIRS", "make_repair"]

REPAIRS = ("auto", "none", "weights", "synthetic", "data", "refit", "calibrate")


def make_repair(repair: str | Repair, model: nn.Module) -> Repair:
    """Return the repair of that name; names joined by ``+`` are applied one after the other.

    Raises:
        UsageError: an unknown name; the message lists the known ones.
    """
    if not isinstance(repair, str):
        if isinstance(repair, type) or not callable(repair):
            raise UsageError(f"repair is {repair!r}; give {', '.join(REPAIRS)}, or an object such as Refit()")
        return repair
    names = repair.split("+")
    for name in names:
        if name not in REPAIRS:
            raise UsageError(f"unknown repair {name!r}; weldnet has {', '.join(REPAIRS)}")
    if len(names) == 1:
        return _make(repair, model)
    if "auto" in names or "none" in names:
        raise UsageError(f"repair {repair!r}: 'auto' and 'none' stand alone; join others, such as refit+calibrate")
    return Chain(tuple(_make(name, model) for name in names))


def _make(name: str, model: nn.Module) -> Repair:
    if name == "data":
        return BatchNormReset() if has_statistics(model) else Rescale()
    kinds: dict[str, Callable[[], Repair]] = {
        "auto": Auto,
        "none": NoRepair,
        "weights": WeightNorms,
        "synthetic": Synthetic,
        "refit": Refit,
        "calibrate": Calibrate,
    }
    return kinds[name]()
