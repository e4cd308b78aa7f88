"""Repair: restore what averaging does to activation statistics. The repairs by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from torch import nn

from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics

__all__ = ["REPAIRS", "NoRepair", "Repair", "make_repair"]


@runtime_checkable
class Repair(Protocol):
    """A frozen value; the averaged network, its parents and the unlabelled data come with the call."""

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a repaired copy of the network, and what was done; nothing that is given is changed."""
        ...


@final
@dataclass(frozen=True)
class NoRepair:
    """Leave the averaged network as it is."""

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return the network itself."""
        model = averaged.model
        return Repaired(
            model, "none: BatchNorm statistics are the parents' average" if has_statistics(model) else "none"
        )


REPAIRS = ("auto", "none", "data")


def make_repair(repair: str | Repair, model: nn.Module, data: Inputs | None) -> Repair:
    """Return the repair of that name; ``auto`` is the best that the model and the data allow.

    Raises:
        UsageError: an unknown name; the message lists the known ones.
    """
    if not isinstance(repair, str):
        if isinstance(repair, type) or not callable(repair):
            raise UsageError(f"repair is {repair!r}; give {', '.join(REPAIRS)}, or an object such as BatchNormReset()")
        return repair
    if repair not in REPAIRS:
        raise UsageError(f"unknown repair {repair!r}; weldnet has {', '.join(REPAIRS)}")
    if repair == "data" or (repair == "auto" and data is not None and has_statistics(model)):
        return BatchNormReset()
    return NoRepair()
