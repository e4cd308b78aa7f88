"""The runner: the cells of a study that are not done yet, into the records of a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from weldnet import records
from weldnet._words import counted
from weldnet.checkpoints import atomic_path
from weldnet.errors import RecordError, UsageError
from weldnet.experiments._cells import Cell, Context, Outcome, filtered, hashed, here
from weldnet.experiments._config import Study
from weldnet.experiments._data import SYNTHETIC, identify_all, marked
from weldnet.experiments._kinds import KINDS
from weldnet.experiments._pool import Executor, Here, Watch
from weldnet.records import Record

__all__ = ["Done", "Observer", "plan", "run_study"]


class Observer:
    """Hears how a run goes; the command line shows it. This one is silent."""

    def start(self, todo: Sequence[Cell], done: int) -> None:
        """Cells that are to be worked on, and how many are done already."""

    def say(self, text: str) -> None:
        """Something that people should know, on one line."""

    def share(self, cell: Cell, share: float) -> None:
        """How much of a cell is done, 0..1."""

    def finish(self, outcome: Outcome) -> None:
        """What became of a cell."""


@final
@dataclass(frozen=True)
class Done:
    """How a run ended.

    Args:
        folder: where its records are.
        cells: how many the study has.
        worked: how many were worked on now.
        failed: those that failed, with their reasons.
        corrupt: lines of the records that could not be read.
    """

    folder: Path
    cells: int
    worked: int
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    corrupt: int = 0


def plan(study: Study, only: Mapping[str, Sequence[str]] | None = None, data: Any = None) -> list[Cell]:
    """Return the cells of a study, in an order in which they can be worked on.

    Args:
        study: the table at its scale.
        only: values by cell word; the rest of the study is left out.
        data: what each dataset is; where it is left out, nothing is loaded and the keys are not final.

    Raises:
        ConfigError: a cell cannot be built.
        UsageError: nothing fits ``only``.
    """
    cells = KINDS[study.kind].cells(study, data or {})
    return filtered(cells, only) if only else cells


def run_study(
    study: Study,
    folder: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    resume: bool = False,
    cache: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
) -> Done:
    """Compute what is missing of a study.

    The records do not depend on the executor, nor on interruptions, but for their order, seconds and memory.

    Args:
        study: the table at its scale.
        folder: of the run: ``records.jsonl``, ``config.yaml``, ``partitions/``, and while it runs ``states/``.
        executor: who works on the cells; this process by default.
        only: values by cell word; the rest is left out.
        resume: go on with the run in that folder; cells that failed are tried again.
        cache: the folder of trained networks; ``networks/`` in the run's folder by default.
        observer: hears how it goes.

    Raises:
        UsageError: the folder holds another study's run; or this one's, and ``resume`` is not set.
        RecordError: another process works in the folder, or the records cannot be written.
        DataError: a dataset is not there.
        ConfigError: as :func:`plan`.
    """
    observer = observer or Observer()
    path = Path(folder)
    _check_folder(path, study, resume)
    data = identify_all(study.protocol.datasets)
    cells = plan(study, only, data)
    with _locked(path):
        _write_config(path, study)
        found = records.read(path) if (path / records.FILE).exists() else records.Records(())
        if found.corrupt:
            lines = counted(found.corrupt, "corrupt line")
            observer.say(f"{path / records.FILE}: {lines} skipped; what was in them is made again")
        _write_heads(path, study, data, found)
        done = {(r.kind, r.key) for r in found if "error" not in r.extra}
        _forget_states(path, [key for _, key in done])
        todo = [cell.without(made.key for made in cell.makes if (made.kind, made.key) in done) for cell in cells]
        todo = [cell for cell in todo if cell.makes]
        observer.start(todo, len(cells) - len(todo))
        context = Context(
            study, path, Path(cache or path / "networks"), data, study.protocol.device, study.protocol.threads
        )
        failed = _work(todo, context, executor or Here(), observer)
        with suppress(OSError):
            (path / "states").rmdir()
    return Done(path, len(cells), len(todo), failed, found.corrupt)


def _work(todo: Sequence[Cell], context: Context, executor: Executor, observer: Observer) -> dict[str, str]:
    """Work on cells; return the reasons of those that failed."""
    failed: dict[str, str] = {}
    watch = Watch(lambda cell, text: observer.say(f"{cell.name}: {text}"), observer.share)
    with closing(executor.map(todo, context, watch)) as outcomes:
        for outcome in outcomes:
            if outcome.fatal:
                raise RecordError(f"{outcome.cell.name}: {outcome.error}; the run stops here, go on with --resume")
            records.append(context.folder, outcome.records or _failures(outcome))
            errors = [r.extra["error"] for r in outcome.records if "error" in r.extra]
            if outcome.error or errors:
                failed[outcome.cell.name] = outcome.error or errors[0]
            if not outcome.error:
                _forget_states(context.folder, outcome.cell.keys)
            observer.finish(outcome)
    return failed


def _failures(outcome: Outcome) -> list[Record]:
    """Make records that say why a cell failed."""
    return [
        Record(kind=made.kind, key=made.key, cell=made.words, extra={"error": outcome.error}, where=here())
        for made in outcome.cell.makes
    ]


def _check_folder(path: Path, study: Study, resume: bool) -> None:
    """Refuse a folder that is no place for this run."""
    config = path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise UsageError(f"{str(path)!r} is a file; give a folder for the run")
    if not config.exists():
        return
    if config.read_text(encoding="utf-8", errors="replace") != study.to_yaml():
        raise UsageError(
            f"{str(path)!r} holds a run with other settings (see its config.yaml); give another folder, or that config"
        )
    if not resume:
        raise UsageError(
            f"{str(path)!r} holds a run of this study already; go on with --resume, or give another folder"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the run's lock, which ends with this process however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
    except OSError as error:
        raise RecordError(f"{str(path)!r} cannot be written ({error.strerror}); give another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise RecordError(
                f"{str(path)!r}: another run (process {owner}) works in this folder; wait, or give another folder"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _write_config(path: Path, study: Study) -> None:
    with atomic_path(path / "config.yaml") as temporary:
        temporary.write_text(study.to_yaml(), encoding="utf-8")


def _write_heads(path: Path, study: Study, data: Mapping[Any, Any], found: records.Records) -> None:
    """Write what the study is, and what its papers say, unless that is there."""
    known = {(record.kind, record.key) for record in found}
    heads = [_run_record(study, data), *_published(study)]
    records.append(path, [record for record in heads if (record.kind, record.key) not in known])


def _run_record(study: Study, data: Mapping[Any, Any]) -> Record:
    notes = [f"synthetic data: {identity.synthetic}; no results" for identity in data.values() if identity.synthetic]
    extra = {
        "title": study.table.title + (SYNTHETIC if notes else ""),
        "table": study.table.table,
        "scale": study.scale,
        "kind": study.kind,
        "about": study.table.about,
        "protocol": study.protocol.model_dump(mode="json"),
        "notes": [*notes, *study.table.notes],
        "data": {f"{name}/{split}": {"rows": i.rows, "sha256": i.sha256} for (name, split), i in data.items()},
    }
    words = {"dataset": marked(study.protocol.datasets[0], data)}
    return Record(kind="run", key=hashed(extra=extra), cell=words, extra=extra, where=here())


def _published(study: Study) -> Iterator[Record]:
    for paper in study.table.paper:
        for row in paper.rows:
            words = {**paper.cell.words, **row.words}
            note = {"note": row.note or paper.cell.note} if row.note or paper.cell.note else {}
            key = hashed(source=paper.source, words=words)
            yield Record(kind="published", key=key, cell=words, values=row.values, extra=note, source=paper.source)


def _forget_states(path: Path, keys: Iterable[str]) -> None:
    """Take away the states of trainings whose results are recorded."""
    for key in keys:
        (path / "states" / f"{key}.state").unlink(missing_ok=True)
