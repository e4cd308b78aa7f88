"""The executor for clusters: cells are tasks of Ray, on this machine or on many."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from weldnet.errors import UsageError
from weldnet.experiments._cells import Cell, Context, Outcome
from weldnet.experiments._pool import TRIES, Watch, next_cell, work_on
from weldnet.records import Record

__all__ = ["RayCluster"]

#: Cells hand over lines of text; what networks they need lies in the cache, as files.
_STORE = 80 * 2**20
_LOST = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")


@final
@dataclass(frozen=True)
class RayCluster:
    """Works in tasks of Ray; one whose process is killed is noticed, and its cell tried once more.

    The run's folder and the cache must be the same files for every machine of the cluster. What a cell says on its way
    is heard when it is done. A cell of a study for GPUs gets one of its own.

    Args:
        workers: how many cells at most are in work; of a cluster as many as its cores, and GPUs, allow if None.
        address: of a running cluster, such as ``"auto"`` or ``"10.0.0.1:6379"``; None starts Ray on this machine, and
            stops it in the end.
        memory: bytes that all cells in work may need together, by their estimates; a single one is always let in.

    Raises:
        UsageError: there is no Ray, no cluster at that address, or no GPU in it for a study that needs one.
    """

    workers: int | None = None
    address: str | None = None
    memory: float = float("inf")

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers can do nothing; give 1 or more")

    def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
        """See :class:`Executor`."""
        plain = context.silent()
        waiting = {cell.name: (cell, 1) for cell in sorted(cells, key=lambda cell: -cell.cost)}
        busy: dict[Any, tuple[Cell, int]] = {}
        # Ray hides GPUs from tasks that ask for none.
        gpus = int(context.device.startswith("cuda"))
        with _started(self.address, self.workers, context.threads, gpus) as (ray, workers):
            # Whether a task is tried again is decided here, where it is said too.
            task = ray.remote(num_cpus=context.threads, num_gpus=gpus, max_retries=0, max_calls=0)(_work)
            try:
                while waiting or busy:
                    working = [cell for cell, _ in busy.values()]
                    while (name := next_cell(waiting, working, workers, self.memory)) is not None:
                        cell, tries = waiting.pop(name)
                        busy[task.remote(cell, plain)] = cell, tries
                        working.append(cell)
                    (ready, *_), _ = ray.wait(list(busy), num_returns=1)
                    cell, tries = busy.pop(ready)
                    outcome, lost = _heard(ray, ready, cell, watch)
                    if lost and tries < TRIES:
                        watch.said(cell, f"{outcome.error}; trying once more")
                        waiting[cell.name] = cell, tries + 1
                        continue
                    yield outcome
            finally:
                for ref in busy:
                    with contextlib.suppress(Exception):
                        ray.cancel(ref, force=True)


def _work(cell: Cell, context: Context) -> tuple[list[str], list[str], str | None, bool]:
    """Do a cell in a process of the cluster; return what it said, its records, and why it failed."""
    import torch

    torch.set_num_threads(context.threads)
    said: list[str] = []
    outcome = work_on(cell, context, Watch(lambda _, text: said.append(text)))
    return said, [record.to_json() for record in outcome.records], outcome.error, outcome.fatal


def _heard(ray: Any, ref: Any, cell: Cell, watch: Watch) -> tuple[Outcome, bool]:
    """Return what became of a task, and whether its process was lost."""
    try:
        said, lines, error, fatal = ray.get(ref)
    except ray.exceptions.RayError as error:
        lost = type(error).__name__ in _LOST
        text = "the worker process ended; was it killed, or out of memory?" if lost else " ".join(str(error).split())
        return Outcome(cell, (), text), lost
    for text in said:
        watch.said(cell, text)
    return Outcome(cell, [Record.from_json(line) for line in lines], error, fatal), False


@contextlib.contextmanager
def _started(address: str | None, workers: int | None, threads: int, gpus: int) -> Iterator[tuple[Any, int]]:
    """Join a cluster, or start Ray on this machine and stop it in the end; give how many cells fit."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("the executor 'ray' needs Ray; pip install 'weldnet[federated]'") from error
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": dict.fromkeys(names, str(threads))},
    }
    if address is None:
        cores = (workers or max(1, (os.cpu_count() or 1) // threads)) * threads
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster answers at {address!r}" if address else "Ray cannot be started here"
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{where} ({reason}); start one with 'ray start --head', or leave the address out") from error
    try:
        has = ray.cluster_resources()
        fits = max(1, int(has.get("CPU", 1)) // threads)
        if gpus:
            fits = min(fits, int(has.get("GPU", 0)))
        if not fits:
            raise UsageError("the study computes on cuda, and Ray has no GPU; give --device cpu, or a cluster that has")
        yield ray, min(workers or fits, fits)
    finally:
        ray.shutdown()
