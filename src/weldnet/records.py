"""Records: one line of JSON for each thing that a study measured or quotes; what experiments write and reports read.

A run's folder holds ``records.jsonl``. Lines are only ever appended, so that an interrupted run loses nothing, and
files of several machines can be put together with ``cat``. Each line is one :class:`Record`:

========== ====================================================================================================
kind       what it is
========== ====================================================================================================
run        the study itself: title, table, scale, protocol and notes in ``extra``
published  a number from a paper: ``values``, with its ``source``; never mixed with measured ones
network    a trained network: scores in ``values``, its epochs in ``extra["history"]``
result     one way to fuse one group of networks: scores in ``values``; ``extra["error"]`` if it failed
curve      a line to draw: ``extra["x"]`` and ``extra["y"]`` (lists by name), such as a barrier
couplings  who went where: ``extra["spaces"]``, matrices by space
round      one round of federated learning
========== ====================================================================================================

What a record is about stands in ``cell``, by the words dataset, partition, architecture, networks, group, seed,
method, repair, stage, size, and for federated learning clients, rule, algorithm, initialisation, round.

- ``method`` is a method of weldnet with the options that are not its defaults (``gamf``, ``gamf sigma=4.0``), or
  ``individual`` (mean of the parents), ``best parent``, ``ensemble``, ``naive``, ``fold``.
- ``stage`` is ``one-shot`` or ``fine-tuned``, ``size`` is in parents, ``group`` numbers the groups of networks.
- ``dataset`` ends in `` (synthetic data)`` where the rows are not those of the dataset of that name; ``extra["notes"]``
  of the run says so too. Such records test the way and are no results.
- Of a curve, ``extra["x"]`` is a list of numbers and ``extra["y"]`` holds lists of that length by name;
  ``extra["about"]`` says what it shows: ``barrier`` has the position on the line from the first network to the one
  aligned to it whose barrier is highest as x, and loss and accuracy as y.
- Of couplings, ``extra["spaces"]`` holds by space ``units`` (the numbers of rows and columns before pooling) and
  ``matrix``, rows being units of the second network and columns those of the universe; large ones are pooled to blocks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final, get_args

from weldnet.errors import RecordError

__all__ = ["FILE", "KINDS", "Kind", "Record", "Records", "append", "read", "where"]

FILE = "records.jsonl"
"""The name of the records' file in a run's folder."""

Kind = Literal["run", "published", "network", "result", "curve", "couplings", "round"]
KINDS: tuple[str, ...] = get_args(Kind)

Scalar = str | int | float | bool | None


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing that was measured, or quoted.

    Args:
        kind: one of :data:`KINDS`.
        key: a hash of what made it; two records of one key are the same measurement. Empty for what has none.
        cell: what it is about, see above.
        values: the numbers, such as ``accuracy`` (0..1), ``loss``, ``seconds``; a number that is not finite is None.
        extra: what is no number.
        source: of a published number: paper, table.
        seed: of everything random in it.
        where: commit, versions and hardware, see :func:`where`; empty for what was not measured.
        time: when it was written, in UTC.
    """

    kind: Kind
    key: str = ""
    cell: Mapping[str, Scalar] = field(default_factory=_empty)
    values: Mapping[str, float | None] = field(default_factory=_empty)
    extra: Mapping[str, Any] = field(default_factory=_empty)
    source: str = ""
    seed: int | None = None
    where: Mapping[str, Scalar] = field(default_factory=_empty)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecordError(f"a record's kind is {self.kind!r}; give one of {', '.join(KINDS)}")

    def to_json(self) -> str:
        """Return the record as one line; :meth:`from_json` gives back an equal one."""
        return json.dumps(_plain({name: getattr(self, name) for name in _FIELDS}), allow_nan=False, ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Record:
        """Read one line.

        Raises:
            RecordError: it is no record.

        >>> line = Record(kind="result", cell={"method": "gamf"}, values={"accuracy": 0.5}).to_json()
        >>> Record.from_json(line).values["accuracy"]
        0.5
        """
        try:
            raw = json.loads(line)
            found = {name: raw[name] for name in _FIELDS if name in raw}
            wrong = next((name for name, value in found.items() if not _fits(name, value)), None)
            if wrong is not None:
                raise ValueError(f"{wrong} is {found[wrong]!r:.40}")
            return Record(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError(f"not a record: {line[:60]!r} ({error})") from error


_FIELDS = tuple(entry.name for entry in fields(Record))
_MAPPINGS = {"cell": str | int | float | None, "values": int | float | None, "where": str | int | float | None}


def _fits(name: str, value: Any) -> bool:
    """Say whether a field that was read may have such a value."""
    if name in _MAPPINGS:
        return isinstance(value, dict) and all(isinstance(entry, _MAPPINGS[name]) for entry in value.values())
    if name == "extra":
        return isinstance(value, dict)
    return isinstance(value, int | None) if name == "seed" else isinstance(value, str)


@final
@dataclass(frozen=True)
class Records:
    """The records of a run, and how many lines could not be read."""

    all: tuple[Record, ...]
    corrupt: int = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def of(self, *kinds: Kind, **cell: Scalar) -> list[Record]:
        """Return the records of some kinds whose cell has the given words.

        >>> found = Records((Record(kind="result", cell={"method": "gamf"}), Record(kind="run")))
        >>> len(found.of("result", method="gamf")), len(found.of("result", method="identity"))
        (1, 0)
        """
        wanted = cell.items()
        return [r for r in self.all if r.kind in kinds and all(r.cell.get(k) == v for k, v in wanted)]


def append(folder: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Add records to a run's folder, whole lines at once and on the disk when this returns.

    Raises:
        RecordError: the file cannot be written; no part of a line is left.
    """
    path = Path(folder) / FILE
    text = "".join(record.to_json() + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a buffer could not write would be tried again when the file is closed.
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and _last_byte(file, end) != b"\n"  # a process was killed in the middle of a line
            try:
                _write_all(file, (("\n" if torn else "") + text).encode())
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)
                raise
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error}); free some space or write elsewhere") from error


def read(source: str | os.PathLike[str]) -> Records:
    """Read the records of a run; of two with the same kind and key the later one counts.

    Args:
        source: a run's folder, or a file of records.

    Returns:
        The records in their order, without lines that are none: those are counted.

    Raises:
        RecordError: there is no such file.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    try:
        # At line feeds only: a text may hold other signs that count as ends of lines, such as U+2028.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); give the folder of a run") from error
    found: dict[Any, Record] = {}
    corrupt = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = Record.from_json(line)
        except RecordError:
            corrupt += 1
            continue
        found[(record.kind, record.key) if record.key else number] = record
    return Records(tuple(found.values()), corrupt)


def where(*packages: str) -> dict[str, Scalar]:
    """Say which code runs on what: commit (of a checkout), versions, machine, cores, threads."""
    import platform
    from importlib import metadata

    import torch

    from weldnet._version import __version__

    versions: dict[str, Scalar] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "weldnet": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **versions,
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
    }


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` if its sources differ; None where weldnet is installed without one."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        ask = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return ask("rev-parse", "--short=12", "HEAD") + ("+changes" if ask("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _write_all(file: Any, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _last_byte(file: Any, end: int) -> bytes:
    file.seek(end - 1)
    last = file.read(1)
    file.seek(end)
    return last


def _plain(value: Any) -> Any:
    """Make a value writable as JSON: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays and tensors
        return _plain(value.tolist())
    return str(value)
