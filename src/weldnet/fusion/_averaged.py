"""What a repair works on, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from weldnet.alignment import Alignment
from weldnet.structure import Structure

__all__ = ["Averaged", "Repaired"]


@final
@dataclass(frozen=True)
class Averaged:
    """An averaged network with where it comes from.

    Args:
        model: the averaged network; not to be changed.
        parents: by name, as they were given; not to be changed.
        shares: of the parents in the average, by name.
        structure: of the averaged network.
        alignment: of the parents; its universe is the averaged network's order.
        structures: of the parents, by name, where they differ from ``structure`` (other widths).
        example_input: what the networks take.
        seed: of everything random.
    """

    model: nn.Module
    parents: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    structure: Structure = field(default_factory=lambda: Structure((), (), (), {}))
    alignment: Alignment = field(default_factory=lambda: Alignment({}))
    structures: Mapping[str, Structure] = field(default_factory=dict[str, Structure])
    example_input: Any = None
    seed: int = 0


@final
@dataclass(frozen=True)
class Repaired:
    """A repaired network.

    Args:
        model: a copy of the averaged one.
        summary: one sentence about what was done, its name first.
        numbers: what was measured, for the report.
    """

    model: nn.Module
    summary: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
