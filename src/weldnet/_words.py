"""Words for people, and the sizes that they write."""

from __future__ import annotations

import math

from weldnet.errors import UsageError

__all__ = ["counted", "parse_size"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def counted(number: int, noun: str) -> str:
    """Say how many there are.

    >>> counted(1, "space"), counted(0, "space"), counted(12, "place")
    ('1 space', '0 spaces', '12 places')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_size(text: str | int) -> int:
    """Read a number of bytes such as ``500MB`` or ``2GB``.

    Raises:
        UsageError: it is none.

    >>> parse_size("2GB"), parse_size("1.5 KiB"), parse_size(7)
    (2000000000, 1536, 7)
    """
    digits = str(text).strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = str(text).strip()[len(digits) :].strip().upper() or "B"
    try:
        size = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not (math.isfinite(size) and size >= 1):
        raise UsageError(f"shard size {str(text)!r} is no size; give a number of bytes such as 500MB or 2GB")
    return int(size)
