"""How error messages show paths, keys and foreign errors: always on one line."""

from __future__ import annotations

import os
from collections.abc import Iterable

_KEY_LENGTH = 120
_REASON_LENGTH = 200


def quote(path: str | os.PathLike[str]) -> str:
    """Show a path in quotes, with line breaks and other control characters escaped."""
    return repr(os.fspath(path))


def plural(count: int, noun: str) -> str:
    """Count a noun: ``1 key``, ``2 keys``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(names: Iterable[str], limit: int = 3) -> str:
    """Show the first names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(_cut(name, _KEY_LENGTH)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def reason(error: BaseException) -> str:
    """Show why a foreign call failed: the system's words, else the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return _cut(lines[0].strip(), _REASON_LENGTH) if lines else type(error).__name__


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
