"""What rules share: the units, the value of every tensor so far, and the parameters' factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Ints, Units, Value

__all__ = ["Context", "Opened", "Rule"]


@dataclass(frozen=True)
class Opened:
    """An axis of a parameter that depends on another one: its units over joint axes of a ``view``."""

    view: tuple[int, ...]
    factor: Factor
    replaces: Ints  # the units of the plain axis, which then must not be used


@dataclass
class Context:
    """The state of one pass over a trace."""

    shapes: dict[str, tuple[int, ...]]
    units: Units = field(default_factory=Units)
    values: dict[int, Value] = field(default_factory=dict)
    opened: dict[tuple[str, int], Opened] = field(default_factory=dict)  # by parameter and axis
    # Computed weights that may be read row by row, and the parameters that they come from.
    rowwise: dict[int, tuple[Value, ...]] = field(default_factory=dict[int, tuple[Value, ...]])
    routed: dict[int, int] = field(default_factory=dict)  # tensors whose rows were given out, and by which numbers
    unknown: dict[str, int] = field(default_factory=dict)
    summed: list[Ints] = field(default_factory=list)  # units that contractions have summed over
    used: frozenset[int] = frozenset()  # tensors that an operation or the output reads
    known: Mapping[int, Tensor] = field(default_factory=dict)  # values of tensors that nothing can change

    fresh_numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1 << 40))  # of parts of operations

    def value(self, ref: Ref) -> Value:
        """Return what is known of a tensor; one that nothing made is a constant of the model."""
        if ref.number not in self.values:
            self.values[ref.number] = Value(ref.shape, why="a constant tensor of the model")
        return self.values[ref.number]


#: A rule gives the values of an operation's outputs, or None where it does not cover this use of the operation.
Rule = Callable[[Context, Operation], list[Value] | None]
