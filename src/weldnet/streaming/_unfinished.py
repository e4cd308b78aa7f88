"""The folder beside the output in which an unfinished fusion lies, and from which it goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from weldnet.checkpoints import StoredState, atomic_path, remove_temporaries
from weldnet.errors import CheckpointError

__all__ = ["Unfinished", "identity_of"]


@final
class Unfinished:
    """What is known of a fusion so far, as files.

    ``settings.json`` says which fusion it is; ``facts.json`` holds what was found out; ``alignment/`` the couplings
    between sweeps; ``alignment.safetensors`` the alignment once it is found; ``result/`` the shards that are whole.

    Args:
        output: the folder that is to be written.
        settings: what decides the result; an unfinished fusion of other settings is an error, unless nothing was found
            out for it yet.

    Raises:
        CheckpointError: the output is there already, another process writes it, or what lies there is of other
            settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f"{self.output.name}.unfinished")
        self._settings = json.loads(json.dumps(settings))
        if os.path.lexists(output):
            raise CheckpointError(f"{str(output)!r} is there already; a folder is written anew: choose another name")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process; it stays if the body fails."""
        try:
            self.result.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise CheckpointError(f"{str(self.output)!r}: cannot be written: {error.strerror}") from error
        with lock:
            _lock(lock.fileno(), self.output)
            self._compare()
            for folder in (self.folder, self.result):
                remove_temporaries(folder)
            yield

    def _compare(self) -> None:
        file = self.folder / "settings.json"
        if not file.exists() or not self._facts.exists():
            _write(file, self._settings)
            return
        known = _read(file)
        for key, value in self._settings.items():
            self._require(key, known.get(key), value)

    def require(self, key: str, value: Any) -> None:
        """Refuse to go on where this was otherwise when the fusion began; keep it if nothing is known yet.

        Raises:
            CheckpointError: naming it.
        """
        self._require(key, self.fact(key, lambda: value), value)

    def _require(self, key: str, known: Any, value: Any) -> None:
        if known != value:
            raise CheckpointError(
                f"{str(self.folder)!r} holds an unfinished fusion with {key} {_short(known)}, and this one "
                f"has {_short(value)}; finish that one first, remove its folder, or choose another output"
            )

    @property
    def _facts(self) -> Path:
        return self.folder / "facts.json"

    @property
    def result(self) -> Path:
        """Where finished shards lie."""
        return self.folder / "result"

    @property
    def alignment(self) -> Path:
        """Where the alignment lies once it is found."""
        return self.folder / "alignment.safetensors"

    @property
    def workspace(self) -> Path:
        """Where couplings lie between sweeps."""
        return self.folder / "alignment"

    def fact(self, key: str, find: Callable[[], Any]) -> Any:
        """Return what was found out earlier under this key, or find it out now and keep it."""
        file = self._facts
        facts = _read(file) if file.exists() else {}
        if key not in facts:
            facts[key] = find()
            _write(file, facts)
        return facts[key]

    def finish(self) -> None:
        """Give the result its name, and remove the rest.

        Raises:
            CheckpointError: it cannot be renamed; it stays where it is.
        """
        try:
            self.result.rename(self.output)
        except OSError as error:
            raise CheckpointError(
                f"{str(self.output)!r}: cannot be written: {error.strerror}; the whole result is in "
                f"{str(self.result)!r}"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)


def identity_of(state: StoredState) -> list[list[Any]]:
    """Return what changes if the files of a checkpoint do: names, sizes, times."""
    return [[os.path.realpath(file), (s := file.stat()).st_size, s.st_mtime_ns] for file in state.files]


def _lock(descriptor: int, output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without locks
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
            return
        raise CheckpointError(
            f"{str(output)!r} is being written by another process; wait, or choose another output"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read ({error}); remove its folder to begin anew") from error


def _write(file: Path, document: Mapping[str, Any]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
