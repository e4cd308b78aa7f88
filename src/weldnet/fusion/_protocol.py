"""What a repair is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from weldnet.activations import Inputs
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import has_statistics

__all__ = ["NoRepair", "Repair"]


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
