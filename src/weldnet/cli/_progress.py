"""One progress display for a run: how much of all cells is done, and when the rest will be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weldnet.cli._common import interactive, say
from weldnet.experiments import Observer

if TYPE_CHECKING:
    from weldnet.experiments import Cell, Outcome

__all__ = ["Progress"]

#: Seconds between two lines where stderr is no terminal.
_PAUSE = 30.0
#: Seconds of estimated work that count as done in as many from the start: else the time to start rules the first guess.
_PRIOR = 60.0


class Progress(Observer):
    """A bar on a terminal, else a line now and then; shares are of the estimated costs."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.shares: dict[str, float] = {}
        self.costs: dict[str, float] = {}
        self.finished = 0
        self.began = self.told = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, todo: Sequence[Cell], done: int) -> None:
        """See :class:`weldnet.experiments.Observer`."""
        self.costs = {cell.name: cell.cost for cell in todo}
        self.began = time.monotonic()
        if done or not todo:
            say(f"{done} cells are done already, {len(todo)} are to be worked on")
        if not interactive() or not todo:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[cells]}"), TimeElapsedColumn())
        self.bar = Bar(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(self.title, total=sum(self.costs.values()), cells="")
        self.bar.start()
        self._update()

    def say(self, text: str) -> None:
        """See :class:`weldnet.experiments.Observer`."""
        if self.bar is not None:
            self.bar.console.print(f"weldnet: note: {text}", highlight=False, markup=False, soft_wrap=True)
        else:
            say(text, kind="note")

    def share(self, cell: Cell, share: float) -> None:
        """See :class:`weldnet.experiments.Observer`."""
        self.shares[cell.name] = share
        self._update()

    def finish(self, outcome: Outcome) -> None:
        """See :class:`weldnet.experiments.Observer`."""
        self.finished += 1
        self.shares[outcome.cell.name] = 1.0
        if outcome.error:
            self.say(f"{outcome.cell.name} failed: {outcome.error}")
        self._update()

    def _update(self) -> None:
        done = sum(self.costs[name] * share for name, share in self.shares.items())
        cells = f"{self.finished}/{len(self.costs)} cells"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, cells=cells)
            return
        now = time.monotonic()
        if now - self.told >= _PAUSE and done:
            self.told = now
            left = time_left(now - self.began, done, sum(self.costs.values()))
            say(f"{self.title}: {cells}, about {_clock(left)} to go")


def time_left(elapsed: float, done: float, total: float) -> float:
    """Estimate the seconds that are left from those of the start, and how much of the estimated work is done.

    >>> round(time_left(elapsed=30, done=0.1, total=50))  # processes have started, and not much else
    75
    >>> round(time_left(36_000, 18_000, 36_000) / 100) * 100  # at half the estimated speed
    35900
    """
    return max(0.0, total - done) * (elapsed + _PRIOR) / (done + _PRIOR)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
