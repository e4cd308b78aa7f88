"""Chain: one repair after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._protocol import Repair

__all__ = ["Chain"]


@final
@dataclass(frozen=True)
class Chain:
    """Apply repairs one after the other, as ``repair="refit+calibrate"`` does.

    Args:
        repairs: in their order; at least one.
    """

    repairs: tuple[Repair, ...]

    def __post_init__(self) -> None:
        if not self.repairs:
            raise UsageError("a chain of repairs is empty; give at least one")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return what the last repair makes of what the others made."""
        summaries: list[str] = []
        numbers: Mapping[str, Any] = {}
        for repair in self.repairs:
            found = repair(averaged, data)
            averaged = replace(averaged, model=found.model)
            summaries.append(found.summary)
            numbers = {**numbers, **found.numbers}
        return Repaired(averaged.model, "; ".join(summaries), numbers)
