"""How much memory a piece of work takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["MEMORY_NOTE", "Peak", "watch_memory"]

MEMORY_NOTE = (
    "peak memory is the growth of the process's resident memory while aligning or repairing, sampled every 5 ms; on a "
    "GPU its allocated memory is added"
)
_STATUS = Path("/proc/self/status")


class Peak:
    """The largest growth seen, in bytes; None where the system does not say."""

    def __init__(self) -> None:
        self.bytes: int | None = None


@contextlib.contextmanager
def watch_memory() -> Iterator[Peak]:
    """Sample the resident memory of this process in a thread; the peak is known when the block ends."""
    peak, start = Peak(), _settled()
    if start is None:
        yield peak
        return
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    allocated = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    done, highest = threading.Event(), [start]

    def sample() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], _resident() or 0)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        highest[0] = max(highest[0], _resident() or 0)
        done.set()
        thread.join()
        on_gpu = torch.cuda.max_memory_allocated() - allocated if gpu else 0
        peak.bytes = highest[0] - start + on_gpu


def _settled() -> int | None:
    """Give freed memory back to the system, so that its reuse is seen as growth; return what is left."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _resident()


def _resident() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
