"""Which method ``auto`` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["AUTO", "Choice", "choose_auto"]


@final
@dataclass(frozen=True)
class Choice:
    """What ``auto`` stands for.

    Args:
        method: a name of ``METHODS``.
        reason: why, in the report's words.
    """

    method: str
    reason: str


#: By whether there is unlabelled data. This table is the only place that decides it.
AUTO = {
    False: Choice("gamf", "highest accuracy without data in docs/results/main-job.md"),
    True: Choice("gamf", "highest accuracy in docs/results/main-job.md"),
}


def choose_auto(has_data: bool) -> Choice:
    """Return what ``auto`` stands for.

    >>> choose_auto(False).method
    'gamf'
    """
    return AUTO[has_data]
