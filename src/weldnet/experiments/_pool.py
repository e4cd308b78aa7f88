"""Executors: who works on cells. Any object with such a ``map`` is one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, final

from weldnet.errors import UsageError, WeldnetError
from weldnet.experiments._cells import Cell, Context, Outcome, is_ready
from weldnet.experiments._kinds import KINDS
from weldnet.records import Record

__all__ = ["TRIES", "Executor", "Here", "Local", "Watch", "available_memory", "next_cell", "work_on"]

#: How often a cell is begun whose worker was lost.
TRIES = 2


@final
@dataclass(frozen=True)
class Watch:
    """Who hears what happens: ``said`` what a cell says, ``share`` how much of it is done, 0..1."""

    said: Callable[[Cell, str], None] = field(default=lambda cell, text: None)
    share: Callable[[Cell, float], None] = field(default=lambda cell, share: None)


class Executor(Protocol):
    """Works on cells."""

    def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
        """Yield the outcome of every cell, as soon as it is there.

        The cells come in an order that works; a cell may be started once :func:`is_ready` says so of those that have
        no outcome yet. It is tried also if what it needs failed.
        A cell that fails is an outcome with an error; nothing is raised for it. After a fatal outcome the caller stops.
        Leaving the iterator early ends the work.
        """
        ...


@final
@dataclass(frozen=True)
class Here:
    """Works in this process, one cell after the other."""

    def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
        """See :class:`Executor`."""
        import torch

        before = torch.get_num_threads()
        try:
            for cell in cells:
                torch.set_num_threads(context.threads)
                yield work_on(cell, context, watch)
        finally:
            torch.set_num_threads(before)


@final
@dataclass(frozen=True)
class Local:
    """Works in processes of this machine; one that is killed is noticed, and its cell tried once more.

    Args:
        workers: how many processes at most.
        memory: bytes that all cells in work may need together, by their estimates; a single one is always let in.
    """

    workers: int
    memory: float = float("inf")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"{self.workers} workers can do nothing; give 1 or more")

    def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
        """See :class:`Executor`."""
        waiting = {cell.name: (cell, 1) for cell in sorted(cells, key=lambda cell: -cell.cost)}
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        try:
            while waiting or busy:
                while (chosen := self._next(waiting, busy)) is not None:
                    worker = idle.pop() if idle else _Worker(context)
                    worker.take(*waiting.pop(chosen))
                    busy.append(worker)
                for worker in _speaking(busy):
                    outcome = worker.hear(watch)
                    if outcome is None:
                        continue
                    busy.remove(worker)
                    if worker.alive:
                        idle.append(worker)
                    elif worker.tries < TRIES:
                        watch.said(outcome.cell, f"{outcome.error}; trying once more")
                        waiting[outcome.cell.name] = outcome.cell, worker.tries + 1
                        continue
                    yield outcome
        finally:
            for worker in (*idle, *busy):
                worker.end()

    def _next(self, waiting: Mapping[str, tuple[Cell, int]], busy: Sequence[_Worker]) -> str | None:
        working = [worker.cell for worker in busy if worker.cell is not None]
        return next_cell(waiting, working, self.workers, self.memory)


def next_cell(
    waiting: Mapping[str, tuple[Cell, int]], working: Sequence[Cell], workers: int, memory: float
) -> str | None:
    """Choose the first of the waiting cells that may start now; None if all must wait.

    Args:
        waiting: cells by name, costliest first.
        working: cells that are in work.
        workers: how many may be in work.
        memory: bytes that they may need together; a single one is always let in.
    """
    if len(working) >= workers:
        return None
    room = memory - sum(cell.memory for cell in working)
    unfinished = [*working, *(cell for cell, _ in waiting.values())]
    for name, (cell, _) in waiting.items():
        if is_ready(cell, unfinished) and (not working or cell.memory <= room):
            return name
    return None


class _Worker:
    """A process that works on one cell at a time."""

    def __init__(self, context: Context) -> None:
        methods = _processes()
        self.link, there = methods.Pipe()
        plain = context.silent()
        self.process = methods.Process(target=_serve, args=(there, plain), daemon=True)
        with _threads(context.threads):
            self.process.start()
        there.close()
        self.cell: Cell | None = None
        self.tries = 0
        self.alive = True

    def take(self, cell: Cell, tries: int) -> None:
        """Start on a cell."""
        self.cell, self.tries = cell, tries
        with contextlib.suppress(OSError):  # it was killed while it was idle: that is heard next
            self.link.send(cell)

    def hear(self, watch: Watch) -> Outcome | None:
        """Take what the process sends; return the outcome of its cell once that is there."""
        assert self.cell is not None
        try:
            kind, content = self.link.recv()
        except (EOFError, OSError):
            self.alive = False
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            error = f"the worker process ended with {how}; was it killed, or out of memory?"
            return Outcome(self.cell, (), error)
        if kind == "said":
            watch.said(self.cell, content)
            return None
        if kind == "share":
            watch.share(self.cell, content)
            return None
        lines, error, fatal = content
        return Outcome(self.cell, [Record.from_json(line) for line in lines], error, fatal)

    def end(self) -> None:
        """End the process; what it is writing is written whole or not at all."""
        self.link.close()
        self.process.kill()
        self.process.join()


def work_on(cell: Cell, context: Context, watch: Watch) -> Outcome:
    """Do a cell in this process."""
    mine = replace(context, say=lambda text: watch.said(cell, text), tick=lambda share: watch.share(cell, share))
    try:
        return Outcome(cell, KINDS[context.study.kind].run(cell, mine))
    except Exception as error:
        text = " ".join(str(error).split())
        reason = text if isinstance(error, WeldnetError) else f"{type(error).__name__}: {text}"
        return Outcome(cell, (), reason, _is_fatal(error))


def available_memory() -> float:
    """Return the bytes that are free on this machine; no bound where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
    return int(found) * 1024


def _is_fatal(error: BaseException) -> bool:
    """Say whether an error is about this machine rather than the cell: then all other cells would fail too."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError | MemoryError):
            return True
        seen = seen.__cause__
    return False


def _speaking(busy: Sequence[_Worker]) -> list[_Worker]:
    """Wait until a process sends something, or ends."""
    ready = wait([worker.link for worker in busy])
    return [worker for worker in busy if worker.link in ready]


def _processes() -> Any:
    """Return how processes are started: by a server that has torch imported, where there can be one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    methods = multiprocessing.get_context("forkserver")
    methods.set_forkserver_preload(["weldnet.experiments._fusion"])
    return methods


def _serve(link: Connection, context: Context) -> None:
    """Work on cells until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(context.threads)
    lock = threading.Lock()

    def send(kind: str, content: Any) -> None:
        with lock:
            link.send((kind, content))

    watch = Watch(lambda cell, text: send("said", text), lambda cell, share: send("share", share))
    with contextlib.suppress(EOFError, OSError):
        while True:
            outcome = work_on(link.recv(), context, watch)
            send("done", ([record.to_json() for record in outcome.records], outcome.error, outcome.fatal))


def _watch_parent(parent: int) -> None:
    """End with the process that started this one, also if that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Bound the threads of a process that starts in this block, those of every library in it."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(number)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
