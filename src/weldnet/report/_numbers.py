"""How numbers are joined and written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

__all__ = ["Metric", "Value", "by_order", "metric", "value_of"]


@final
@dataclass(frozen=True)
class Metric:
    """What is measured, and how it is written.

    Args:
        key: its name in records.
        label: for people.
        unit: of the written number.
        scale: from the record's number to the written one.
        form: a format of the written number.
        better: which is better; None where neither is.
    """

    key: str
    label: str
    unit: str = ""
    scale: float = 1.0
    form: str = ".4g"
    better: Literal["high", "low"] | None = None

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """Write a record's number.

        >>> metric("accuracy").text(0.98125), metric("loss").text(None)
        ('98.12', '')
        """
        return "" if value is None else format(value * self.scale, self.form)

    def with_unit(self, value: float | None) -> str:
        """Write a record's number with its unit."""
        text = self.text(value)
        return f"{text} {self.unit}" if text and self.unit else text


_SHARE = ("%", 100.0, ".2f")
_KNOWN = (
    Metric("accuracy", "accuracy", *_SHARE, "high"),
    Metric("loss", "loss", "", 1.0, ".4f", "low"),
    Metric("calibration_error", "calibration error", "", 1.0, ".4f", "low"),
    Metric("barrier", "barrier", "", 1.0, ".4f", "low"),
    Metric("area", "area of the barrier", "", 1.0, ".4f", "low"),
    Metric("agreement", "agreement", *_SHARE, "high"),
    Metric("moved", "units moved", "%", 100.0, ".1f"),
    Metric("objective", "objective", "", 1.0, ".4f"),
    Metric("size_used", "size used", "", 1.0, ".2f"),
    Metric("weight", "weight", "", 1.0, ".3g"),
    Metric("equivalence", "equivalence error", "", 1.0, ".1e"),
    Metric("seconds", "time", "s", 1.0, ".2f"),
    Metric("memory", "memory", "MB", 1e-6, ".1f"),
    Metric("samples", "inputs used", "", 1.0, ",.0f"),
    Metric("parameters", "parameters", "", 1.0, ",.0f"),
    Metric("bytes", "sent", "MB", 1e-6, ".2f"),
    Metric("missing", "missing clients", "", 1.0, ".0f"),
)
_METRICS = {entry.key: entry for entry in _KNOWN}


def metric(key: str) -> Metric:
    """Return how a number is written; of an unknown one its own name is the label."""
    return _METRICS.get(key) or Metric(key, key.replace("_", " "))


def by_order(keys: Iterable[str]) -> list[str]:
    """Put names of metrics in the order of a table: known ones first, the others as they come."""
    order = {key: position for position, key in enumerate(_METRICS)}
    return sorted(dict.fromkeys(keys), key=lambda key: order.get(key, len(order)))


@final
@dataclass(frozen=True)
class Value:
    """The mean of some numbers, their sample standard deviation (None for a single one), and the numbers."""

    mean: float
    spread: float | None
    each: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return len(self.each)


def value_of(numbers: Iterable[float | None]) -> Value | None:
    """Return mean and deviation of the numbers that are finite; None if there are none.

    >>> found = value_of([1.0, 2.0, None, 3.0])
    >>> (found.mean, found.spread, found.count) if found else None
    (2.0, 1.0, 3)
    """
    each = tuple(float(number) for number in numbers if number is not None and math.isfinite(number))
    if not each:
        return None
    return Value(statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None, each)
