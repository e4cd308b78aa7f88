"""A run in a table: means over groups, beside the published numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, final

from weldnet import records
from weldnet.records import Record

__all__ = ["Line", "summarise"]

_SETTING = ("dataset", "partition", "architecture", "networks")
_ROW = ("method", "repair", "stage", "size")


@final
@dataclass(frozen=True)
class Line:
    """One way to fuse in one setting.

    Args:
        words: the cell words of all its results, without the group.
        values: by name, one for each group.
        quoted: published numbers, by name.
        source: of these.
    """

    words: Mapping[str, Any]
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    quoted: Mapping[str, float] = field(default_factory=dict[str, float])
    source: str = ""

    @property
    def setting(self) -> str:
        """The setting in a line."""
        return ", ".join(f"{self.words.get(word)}" for word in _SETTING) + " networks"

    @property
    def method(self) -> str:
        """How it was fused."""
        size = self.words.get("size") or 1
        return str(self.words.get("method")) + (f" size {size:g}" if size != 1 else "")

    @property
    def repair(self) -> str | None:
        """How it was repaired."""
        return self.words.get("repair")

    @property
    def stage(self) -> str:
        """One-shot or fine-tuned."""
        return str(self.words.get("stage") or "one-shot")

    def ours(self, name: str) -> str:
        """Write what was measured: the mean, and the deviation over groups."""
        values = self.values.get(name, ())
        return "" if not values else _written(name, fmean(values)) + _spread(name, values)

    def published(self, name: str) -> str:
        """Write what a paper says."""
        return "" if name not in self.quoted else _written(name, self.quoted[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the line as plain data."""
        means = {name: fmean(values) for name, values in self.values.items()}
        spread = {name: stdev(values) if len(values) > 1 else None for name, values in self.values.items()}
        groups = max(map(len, self.values.values()), default=0)
        return {**self.words, "groups": groups, "mean": means, "sd": spread, "published": dict(self.quoted)}


def summarise(folder: str | os.PathLike[str]) -> list[Line]:
    """Return the results of a run, one line for each way to fuse in each setting, then published ones without ours.

    Raises:
        RecordError: there are no records.
    """
    found = records.read(folder)
    quoted = {_key(record): record for record in found.of("published")}
    values: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    words: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in found.of("result"):
        key = _key(record)
        words.setdefault(key, {w: record.cell.get(w) for w in (*_SETTING, *_ROW)})
        numbers = values.setdefault(key, {})
        for name, value in record.values.items():
            if value is not None:
                numbers.setdefault(name, []).append(value)
    return [_line(words[key], numbers, quoted.get(key)) for key, numbers in values.items()] + [
        _line({w: record.cell.get(w) for w in (*_SETTING, *_ROW)}, {}, record)
        for key, record in quoted.items()
        if key not in values
    ]


def _line(words: Mapping[str, Any], numbers: Mapping[str, list[float]], paper: Record | None) -> Line:
    kept = {name: tuple(entries) for name, entries in numbers.items()}
    if paper is None:
        return Line(words, kept)
    return Line(words, kept, {k: v for k, v in paper.values.items() if v is not None}, paper.source)


def _key(record: Record) -> tuple[Any, ...]:
    """What makes two results comparable; the paper's rows without a word for the repair had none."""
    cell = record.cell
    fused = cell.get("method") not in ("individual", "best parent", "ensemble")
    repair = cell.get("repair") or ("none" if fused else None)
    setting = [cell.get(word) for word in _SETTING]
    return (*setting, cell.get("method"), repair, cell.get("stage") or "one-shot", cell.get("size") or 1.0)


def _written(name: str, value: float) -> str:
    return f"{100 * value:.2f}" if name == "accuracy" else f"{value:.3f}"


def _spread(name: str, values: tuple[float, ...]) -> str:
    return f" ({_written(name, stdev(values))})" if len(values) > 1 else ""
