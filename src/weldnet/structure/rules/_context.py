"""What rules share: the units, the value of every tensor so far, and the parameters' factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Ints, Units, Value

__all__ = ["Context", "Opened", "Rule"]


@dataclass(frozen=True)
class Opened:
    """A parameter whose axis depends on another one: its units over joint ``axes`` of a ``view``."""

    view: tuple[int, ...]
    factor: Factor
    replaces: Ints  # the units of the plain axis, which then must not be used


@dataclass
class Context:
    """The state of one pass over a trace."""

    shapes: dict[str, tuple[int, ...]]
    units: Units = field(default_factory=Units)
    values: dict[int, Value] = field(default_factory=dict)
    opened: dict[str, Opened] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    used: frozenset[int] = frozenset()  # tensors that an operation or the output reads

    def value(self, ref: Ref) -> Value:
        """Return what is known of a tensor; one that nothing made is a constant of the model."""
        if ref.number not in self.values:
            self.values[ref.number] = Value(ref.shape, why="a constant tensor of the model")
        return self.values[ref.number]


Rule = Callable[[Context, Operation], list[Value]]
