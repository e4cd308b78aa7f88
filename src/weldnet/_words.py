"""Words for people."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str) -> str:
    """Say how many there are.

    >>> counted(1, "space"), counted(0, "space"), counted(12, "place")
    ('1 space', '0 spaces', '12 places')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
