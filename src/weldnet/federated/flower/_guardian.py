"""Outlives a command that is killed by force, and ends what it had started. A program of its own: imports none of ours.

``python _guardian.py OWNER MARK SECONDS``: wait until the process OWNER is gone, give what it started SECONDS to end by
itself, then kill every process whose environment holds MARK.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

__all__ = ["gone", "marked"]


def marked(mark: str) -> list[int]:
    """Return the processes whose environment holds ``NAME=value``; none where there is no /proc."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def gone(process: int) -> bool:
    """Whether there is no such process any more."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _main(owner: int, mark: str, grace: float) -> None:
    while not gone(owner):
        time.sleep(0.5)
    end = time.monotonic() + grace
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.5)
    for process in marked(mark):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
