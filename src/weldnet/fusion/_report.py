"""What a fusion measured: parents, ensemble, naive and fused beside one another."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from weldnet._words import counted
from weldnet.alignment import Diagnosis
from weldnet.fusion._size import Sized

__all__ = ["Report", "Row", "score_text"]


@final
@dataclass(frozen=True)
class Row:
    """One network of the table.

    Args:
        name: of the network.
        role: ``parent``, ``ensemble``, ``naive`` or ``fused``.
        scores: what was measured, such as ``{"accuracy": 0.98, "loss": 0.06}``; empty without evaluation.
        weight: the parent's share in the average.
        moved: share of the parent's hidden units that the alignment renumbered.
        equivalence: largest relative change of the parent's output by its transport (float64).
        agreement: share of samples with the same answer, by parent and with the ``ensemble``; empty without labels.
    """

    name: str
    role: str
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    weight: float | None = None
    moved: float | None = None
    equivalence: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict[str, float])


@final
@dataclass(frozen=True)
class Report:
    """The numbers of one fusion; ``print(report)`` shows the table, :meth:`to_dict` gives JSON-ready data.

    Args:
        rows: parents first, then ensemble, naive and fused.
        method: what aligned, as it prints.
        repair: what was done after averaging.
        objective: mean cosine of the aligned weights, 1 for equal networks; None where the method has none.
        check: what the permutation test saw, or why it was not made.
        spaces: number of spaces that were aligned.
        free_share: share of the hidden positions that can be renumbered.
        parameters: numbers in the fused network.
        size: what was kept side by side, and what that takes; None where everything was averaged.
        seconds: by step.
        repair_numbers: what the repair measured.
        diagnosis: how well each space was matched.
        notes: what the reader should know, in full sentences.
    """

    rows: tuple[Row, ...]
    method: str
    repair: str
    objective: float | None
    check: str
    spaces: int
    free_share: float
    parameters: int
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    size: Sized | None = None
    repair_numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    diagnosis: Diagnosis = field(default_factory=lambda: Diagnosis(()))

    def row(self, role: str) -> Row | None:
        """Return the first row of a role."""
        return next((row for row in self.rows if row.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "diagnosis": self.diagnosis.to_dict()}

    def table(self) -> Any:
        """Return the table as a ``rich`` renderable."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="fusion", title_justify="left")
        table.add_column("network")
        table.add_column("role")
        scores = list(dict.fromkeys(key for row in self.rows for key in row.scores))
        for heading in (*(key.replace("_", " ") for key in scores), "weight", "moved", "equivalence error"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            if not row.scores and row.weight is None:
                continue  # nothing was measured for it
            cells = [score_text(key, row.scores.get(key)) for key in scores]
            cells += [
                "" if row.weight is None else f"{row.weight:.3g}",
                "" if row.moved is None else f"{row.moved:.1%}",
                "" if row.equivalence is None else f"{row.equivalence:.1e}",
            ]
            table.add_row(row.name, row.role, *cells, style="bold" if row.role == "fused" else None)
        return table

    def lines(self) -> list[str]:
        """Return what stands below the table, one fact a line."""
        objective = "" if self.objective is None else f", objective {self.objective:.4f}"
        times = ", ".join(f"{step} {value:.2f}" for step, value in self.seconds.items())
        return [
            f"method     {self.method}{objective}",
            f"structure  {counted(self.spaces, 'space')}, {self.free_share:.1%} of the hidden positions free",
            f"check      {self.check}",
            f"repair     {self.repair}",
            *self._variance(),
            f"size       {self.parameters:,} parameters" + ("" if self.size is None else f"; {self.size}"),
            f"seconds    {times}",
            *self._agreement(),
            *(f"note       {note}" for note in self.notes),
        ]

    def _agreement(self) -> list[str]:
        """Say how often the fused network answers as each parent and the ensemble do."""
        fused = self.row("fused")
        if fused is None or not fused.agreement:
            return []
        parts = ", ".join(f"{name} {share:.2%}" for name, share in fused.agreement.items())
        return [f"agreement  of the fused network's answers with {parts}"]

    def _variance(self) -> list[str]:
        """Return a line on the layer whose activations averaging shrank most, if they were measured."""
        found = self.repair_numbers.get("variance")
        if not found:
            return []
        name, weakest = min(found.items(), key=lambda entry: entry[1]["before"])
        least = min(ratio["after"] for ratio in found.values())
        return [
            f"variance   {weakest['before']:.2f} of the parents' at {name or 'the network'!r}, the weakest layer; "
            f"after the repair {weakest['after']:.2f} there, {least:.2f} at the least"
        ]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self.table())
        for line in self.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def score_text(key: str, value: float | None) -> str:
    """Write a score as tables show it."""
    if value is None:
        return ""
    return f"{value:.2%}" if key == "accuracy" else f"{value:.4f}"
