"""Writing files whole or not at all, whatever is in them."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from weldnet.checkpoints._text import quote, reason
from weldnet.errors import CheckpointError

_NAME_BYTES = 255
_TEMPORARY = ".weldnet-{}.tmp"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields a temporary path in the target's folder; the body writes there. At the end the file is flushed to
    disk and renamed over the target. On any failure, an interrupt included, the temporary file and the
    folders made for it are removed, and an existing target stays as it was.

    Args:
        path: the target; missing folders above it are made. A symbolic link is followed, and the permissions
            of an existing target are kept.

    Raises:
        CheckpointError: the target cannot be written, or the disk is full. Other errors of the body pass.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "report.json"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("{}")
        >>> target.read_text()
        '{}'
    """
    target = _resolve(path)
    temporary = target.parent / _temporary_name()
    made: list[Path] = []
    try:
        with _reporting(path):
            _make_folders(target.parent, made)
            mode = _create(temporary)
        with _reporting(path, only=temporary):
            yield temporary
        with _reporting(path):
            _finish(temporary, target, mode)
    except BaseException:
        _remove(temporary, made)
        raise


def check_writable(path: str | os.PathLike[str], *, suffixes: Collection[str] | None = None) -> None:
    """Find out whether a file can be written, before the work whose result it takes. Leaves nothing behind.

    Args:
        path: the file to be written later; it and the folders above it may exist or not.
        suffixes: the extensions it may have, such as `SUFFIXES` for `save`; None for any.

    Raises:
        CheckpointError: the extension is unknown, or the path is a folder, below a file, or protected.
    """
    check_suffix(path, suffixes)
    probe = _nearest_folder(_resolve(path).parent, path) / _temporary_name()
    try:
        with _reporting(path):
            _create(probe)
    finally:
        _remove(probe, [])


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing; whoever calls this is the only writer there."""
    for file in folder.glob(_TEMPORARY.format("*")):
        _remove(file, [])


def check_suffix(path: str | os.PathLike[str], suffixes: Collection[str] | None) -> None:
    """Refuse an output path whose extension is not among the given ones."""
    suffix = Path(path).suffix
    if suffixes is not None and suffix not in suffixes:
        raise CheckpointError(f"{quote(path)}: cannot write the extension {suffix!r}; use one of {', '.join(suffixes)}")


def unwritable(path: str | os.PathLike[str], why: str) -> str:
    """Say that an output file was not written, and why."""
    return f"{quote(path)}: cannot be written: {why}; choose another output path or make room"


@contextlib.contextmanager
def _reporting(path: str | os.PathLike[str], *, only: Path | None = None) -> Iterator[None]:
    """Turn OS errors into a CheckpointError; with `only`, just those about that file or none."""
    try:
        yield
    except OSError as error:
        if only is not None and error.filename is not None and str(error.filename) != str(only):
            raise
        raise CheckpointError(unwritable(path, reason(error))) from error


def _resolve(path: str | os.PathLike[str]) -> Path:
    """Follow links to the real target and refuse what is no place for a file."""
    try:
        target = Path(os.path.realpath(path))
        fault = _fault(target)
    except (OSError, ValueError) as error:
        raise CheckpointError(unwritable(path, reason(error))) from error
    if fault:
        raise CheckpointError(unwritable(path, fault))
    return target


def _fault(target: Path) -> str | None:
    if target.is_dir():
        return "it is a folder"
    if target.is_symlink():
        return "it is a link that leads to itself"
    if len(os.fsencode(target.name)) > _NAME_BYTES:
        return "the file name is too long"
    if not target.exists():
        return None
    # Renaming over a device such as /dev/null would replace it.
    if not target.is_file():
        return "it is not a regular file"
    return None if os.access(target, os.W_OK) else "the existing file is read-only"


def _nearest_folder(folder: Path, path: str | os.PathLike[str]) -> Path:
    nearest = next(f for f in (folder, *folder.parents) if os.path.lexists(f))
    if not nearest.is_dir():
        raise CheckpointError(unwritable(path, f"{quote(nearest)} is not a folder"))
    return nearest


def _create(file: Path) -> int:
    """Make an empty file as the umask has it (`tempfile` would let nobody else read it); return its mode."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    for step in reversed(missing):
        made.append(step)
        step.mkdir(exist_ok=True)


def _temporary_name() -> str:
    return _TEMPORARY.format(secrets.token_hex(8))


def _finish(temporary: Path, target: Path, mode: int) -> None:
    # Set for new files too: some writers, safetensors among them, put a private file of their own there.
    temporary.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else mode)
    _sync(temporary)
    os.replace(temporary, target)
    # The rename has happened: a folder that cannot be flushed (a network share) is no reason to fail.
    with contextlib.suppress(OSError):
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(temporary: Path, made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()
