"""Cells: the pieces of work of a study, each on its own, and what a worker is given with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from weldnet.data import Identity
from weldnet.errors import UsageError
from weldnet.records import Kind as RecordKind
from weldnet.records import Record, where

__all__ = ["Cell", "Context", "Made", "Outcome", "filtered", "hashed", "here", "is_ready"]

Words = Mapping[str, str | int | float | bool | None]


@final
@dataclass(frozen=True)
class Made:
    """A record that a cell makes: its key, kind and cell words."""

    key: str
    words: Words
    kind: RecordKind = "result"


@final
@dataclass(frozen=True)
class Cell:
    """A piece of work, which any process can do once what it needs is done.

    Args:
        name: for people.
        makes: the records by which it counts as done; a cell may write others beside them.
        work: what its kind gives its worker; it must be picklable.
        needs: keys of records that other cells make before; should those fail, this cell is tried all the same.
        cost: estimated seconds on one core.
        memory: estimated bytes.
    """

    name: str
    makes: tuple[Made, ...]
    work: Any
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    memory: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the records that it makes."""
        return tuple(made.key for made in self.makes)

    def without(self, keys: Iterable[str]) -> Cell:
        """Return the cell without some of its records."""
        gone = set(keys)
        return replace(self, makes=tuple(made for made in self.makes if made.key not in gone))


@dataclass(frozen=True)
class Context:
    """What every cell of a study is worked on with.

    Args:
        study: the table at its scale.
        folder: of the run.
        cache: folder of trained networks; may be shared by runs.
        data: what each dataset is, by name and split.
        device: where to compute.
        threads: of the processor, for each worker; with another number the last bits differ.
        say: tells people something, on one line.
        tick: tells how much of the cell is done, 0..1.
    """

    study: Any
    folder: Path
    cache: Path
    data: Mapping[tuple[str, str], Identity]
    device: str = "cpu"
    threads: int = 1
    say: Callable[[str], None] = field(default=print, compare=False)
    tick: Callable[[float], None] = field(default=lambda share: None, compare=False)

    def silent(self) -> Context:
        """Return a copy that can be sent to another process: nobody hears what it tells."""
        return replace(self, say=_nothing, tick=_nothing)


def _nothing(*_: object) -> None:
    """Hear nothing."""


@final
@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: which.
        records: what it made.
        error: why it failed; empty if it did not.
        fatal: whether the others would fail too, as on a full disk.
    """

    cell: Cell
    records: Sequence[Record] = ()
    error: str = ""
    fatal: bool = False


@lru_cache(maxsize=1)
def here() -> dict[str, Any]:
    """Say once a process which code runs on what."""
    return dict(where())


def hashed(**facts: Any) -> str:
    """Return a hash of facts: JSON values, whose order does not matter.

    >>> hashed(a=1, b=(2,)) == hashed(b=[2], a=1) != hashed(a=2, b=[2])
    True
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def filtered(cells: Sequence[Cell], only: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Keep what has the given cell words, and what that needs.

    Args:
        cells: of a study.
        only: values by word, as text; of several values any will do.

    Raises:
        UsageError: an unknown word, or no cell has the values.
    """
    results = [made for cell in cells for made in cell.makes if made.kind != "network"]
    words = list(dict.fromkeys(word for made in results for word in made.words))
    for word in only:
        if word not in words:
            raise UsageError(f"--only: unknown word {word!r}; the cells of this study have {', '.join(words)}")
    wanted = {made.key for made in results if all(_fits(made, word, values) for word, values in only.items())}
    if not wanted:
        word, values = next(iter(only.items()))
        known = sorted({str(made.words.get(word)) for made in results})
        raise UsageError(f"--only {word}={','.join(values)}: no cell fits all filters; {word} is {', '.join(known)}")
    kept = {cell.name: cell.without(key for key in cell.keys if key not in wanted) for cell in cells}
    needed = {key for cell in kept.values() if cell.makes for key in cell.needs}
    return [
        cell if needed.intersection(cell.keys) else kept[cell.name]
        for cell in cells
        if kept[cell.name].makes or needed.intersection(cell.keys)
    ]


def is_ready(cell: Cell, unfinished: Iterable[Cell]) -> bool:
    """Say whether nothing that a cell needs is still to be made by one of the unfinished cells."""
    needs = set(cell.needs)
    return not any(needs.intersection(other.keys) for other in unfinished)


def _fits(made: Made, word: str, values: Sequence[str]) -> bool:
    found = made.words.get(word)
    return any(str(found) == value or (isinstance(found, int | float) and _number(value) == found) for value in values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
