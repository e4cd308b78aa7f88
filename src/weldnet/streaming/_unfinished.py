"""The folder beside the output in which an unfinished fusion lies, and from which it goes on."""

from __future__ import annotations

import contextlib
import errno
import itertools
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
        self.begun = False
        if os.path.lexists(output):
            raise CheckpointError(f"{str(output)!r} is there already; a folder is written anew: choose another name")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process; it stays if the body fails. ``begun`` says whether it goes on from one."""
        try:
            self.result.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise CheckpointError(f"{str(self.output)!r}: cannot be written: {error.strerror}") from error
        with lock:
            _lock(lock.fileno(), self.output)
            self.begun = self._facts.exists()
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
                f"{str(self.folder)!r} holds an unfinished fusion, and {_difference(key, known, value)}; finish that "
                "one first, remove its folder, or choose another output"
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


def _difference(key: str, known: Any, value: Any) -> str:
    """Name the first thing that differs.

    >>> _difference("options", {"tau": 1.0, "precision": "float32"}, {"tau": 1.0, "precision": "bfloat16"})
    'precision is float32 there and bfloat16 here'
    >>> _difference("files", {"a": [["/a.safetensors", 80, 1]]}, {"a": [["/a.safetensors", 80, 2]]})
    "the date of the file '/a.safetensors' has changed since"
    """
    if isinstance(known, dict) and isinstance(value, dict):
        before, now = dict[str, Any](known), dict[str, Any](value)
        name = next(n for n in (*now, *before) if before.get(n) != now.get(n))
        if key == "files":
            return _changed(name, before.get(name) or [], now.get(name) or [])
        return _difference(name if key == "options" else f"{key}: {name}", before.get(name), now.get(name))
    there, here = _short(_text(known), _text(value))
    return f"{key} is {there} there and {here} here"


def _changed(name: str, known: list[list[Any]], value: list[list[Any]]) -> str:
    """Name the first file of a network that is another one, or has changed."""
    there, here = ([file[0] for file in files] for files in (known, value))
    if there != here:
        return _difference(name, ", ".join(there), ", ".join(here))
    (path, was, _), (_, size, _) = next(pair for pair in zip(known, value, strict=True) if pair[0] != pair[1])
    if was == size:
        return f"the date of the file {path!r} has changed since"
    return f"the file {path!r} has changed since: it had {was} bytes and has {size}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(*texts: str) -> list[str]:
    """Cut long texts to where they differ."""
    if all(len(text) <= 80 for text in texts):
        return list(texts)
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    start = max(0, len(list(same)) - 30)
    return [f"{'...' * bool(start)}{text[start : start + 70]}{'...' * (len(text) > start + 70)}" for text in texts]
