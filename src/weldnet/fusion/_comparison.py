"""What :func:`weldnet.compare` gives: one row for each combination of a method and a repair."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from weldnet.errors import UsageError
from weldnet.fusion._report import score_text

__all__ = ["Combination", "Comparison", "Reference"]

#: Scores of which more is better; of all other numbers less is.
_HIGH_IS_GOOD = ("accuracy",)
_NUMBERS = ("barrier", "seconds", "memory", "samples")
_WORDS = ("method", "repair")


@final
@dataclass(frozen=True, kw_only=True)
class Reference:
    """A parent, or the ensemble of the parents, beside which combinations are judged.

    Args:
        name: of the network.
        role: ``parent`` or ``ensemble``.
        scores: what was measured.
    """

    name: str
    role: str
    scores: Mapping[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class Combination:
    """One method with one repair.

    Args:
        method: as it prints.
        repair: as it was asked for.
        scores: what was measured on the fused network, such as accuracy, loss and calibration error.
        barrier: of the loss between the first parent and the others aligned to it, the largest; the repair has no part.
        seconds: of aligning, transport, averaging and repairing; the alignment counts in full for each repair.
        memory: peak growth while aligning or repairing, in bytes; None where the system does not say.
        samples: how many different unlabelled inputs the method or the repair read.
        done: what the repair did.
        error: why the combination failed; None if it did not.
    """

    method: str
    repair: str
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    barrier: float | None = None
    seconds: float | None = None
    memory: int | None = None
    samples: int = 0
    done: str = ""
    error: str | None = None

    def value(self, column: str) -> float | str | None:
        """Return what a column shows: a word, a number, or None if there is none."""
        if column in (*_WORDS, *_NUMBERS):
            return getattr(self, column)
        return self.scores.get(column)


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All combinations on the same networks; ``print`` shows the table.

    Args:
        rows: one for each method and repair, in the order in which they were asked for.
        references: parents and ensemble.
        notes: how the numbers were measured.
    """

    rows: tuple[Combination, ...]
    references: tuple[Reference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worked(self) -> tuple[Combination, ...]:
        """The rows that did not fail."""
        return tuple(row for row in self.rows if row.error is None)

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores."""
        return tuple(dict.fromkeys(name for row in (*self.references, *self.rows) for name in row.scores))

    @property
    def columns(self) -> tuple[str, ...]:
        """What the rows can be sorted by."""
        return (*_WORDS, *self.scores, *_NUMBERS)

    def sorted(self, by: str | None = None) -> tuple[Combination, ...]:
        """Return the rows, best first; failed ones and those without the number last.

        Args:
            by: a name of ``columns``; accuracy by default, else the first score, else seconds.

        Raises:
            UsageError: there is no such column.
        """
        if by is None:
            by = "accuracy" if "accuracy" in self.scores else (*self.scores, "seconds")[0]
        if by not in self.columns:
            raise UsageError(f"the comparison has no column {by!r}; sort by {', '.join(self.columns)}")

        def key(row: Combination) -> tuple[int, Any]:
            value = row.value(by)
            if row.error is not None:
                return 2, 0
            if value is None or (isinstance(value, float) and math.isnan(value)):
                return 1, 0
            return 0, -value if by in _HIGH_IS_GOOD and not isinstance(value, str) else value

        return tuple(sorted(self.rows, key=key))

    def best(self, by: str | None = None) -> Combination:
        """Return the best row; ``by`` as for :meth:`sorted`.

        Raises:
            UsageError: there is no such column, or every combination failed.
        """
        found = self.sorted(by)
        if not self.worked:
            raise UsageError("no combination worked, so that none is best; the rows say why in `error`")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return asdict(self)

    def to_csv(self, by: str | None = None) -> str:
        """Return the rows as CSV with a header, sorted as by :meth:`sorted`; numbers are not rounded."""
        out = io.StringIO()
        columns = (*self.columns, "done", "error")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        for row in self.sorted(by):
            rest = {"done": row.done, "error": row.error}
            cells = [rest[c] if c in rest else row.value(c) for c in columns]
            writer.writerow(["" if cell is None else cell for cell in cells])
        return out.getvalue()

    def table(self, by: str | None = None) -> Any:
        """Return the table as a ``rich`` renderable; ``by`` as for :meth:`sorted`."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="comparison", title_justify="left")
        table.add_column("method")
        table.add_column("repair", overflow="fold")
        for heading in (*(name.replace("_", " ") for name in self.scores), "barrier", "seconds", "memory", "samples"):
            table.add_column(heading, justify="right")
        for reference in self.references:
            scores = [score_text(name, reference.scores.get(name)) for name in self.scores]
            table.add_row(f"{reference.role} {reference.name}".strip(), "", *scores, style="dim")
        for number, row in enumerate(self.sorted(by)):
            style = "bold" if not number and row.error is None else None
            table.add_row(row.method, row.repair, *self._cells(row), style=style)
        return table

    def _cells(self, row: Combination) -> list[str]:
        if row.error is not None:
            return ["failed", *[""] * (len(self.scores) + 3)]
        return [
            *(score_text(name, row.scores.get(name)) for name in self.scores),
            "" if row.barrier is None else f"{row.barrier:.4f}",
            "" if row.seconds is None else f"{row.seconds:.2f}",
            "" if row.memory is None else f"{row.memory / 2**20:.1f} MiB",
            str(row.samples),
        ]

    def lines(self) -> list[str]:
        """Return what stands below the table: why combinations failed, and how the numbers were measured."""
        failed = [
            f"failed     {row.method} with {row.repair}: {row.error}" for row in self.rows if row.error is not None
        ]
        return [*failed, *(f"note       {note}" for note in self.notes)]

    def text(self, by: str | None = None) -> str:
        """Return the table and what stands below it as text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self.table(by), highlight=False, markup=False)
        for line in self.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()
