"""Records of a study: each case in a process of its own with a time limit, and where the numbers come from.

The limit is on processor time, so that other jobs on the machine fail nobody; on the clock it is ten times that.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import signal
import subprocess
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: How the error of a case at its time limit begins.
NO_ANSWER = "no answer"


def run_alone(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Run one case in a forked process, so that what is imported is there at once.

    Args:
        work: returns the record.
        seconds: the limit of processor time.

    Returns:
        The record; ``{"error": one line}`` after an exception, a crash or at the time limit.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(work, there, seconds))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(10 * seconds) else {"error": f"{NO_ANSWER} in {10 * seconds:.0f} s"}
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            return {"error": f"{NO_ANSWER} in {seconds:.0f} CPU seconds"}
        return {"error": f"the process ended with code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _report(work: Callable[[], dict[str, Any]], to: Connection, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        to.send(work())
    except Exception as error:  # a record like any other
        to.send({"error": one_line(f"{type(error).__name__}: {error}")})


def one_line(text: object, length: int = 160) -> str:
    """Squeeze a message into one line that fits a table."""
    line = " ".join(str(text).split()).replace("|", "/")
    return line if len(line) <= length else line[: length - 3] + "..."


def provenance(*packages: str) -> dict[str, str]:
    """Say which code ran on what: commit, versions, machine."""
    run = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True).stdout.strip()  # noqa: E731
    commit = run("rev-parse", "--short", "HEAD") + ("+changes" if run("status", "--porcelain", "src") else "")
    versions = {name: _version(name) for name in ("torch", *packages)}
    return {"commit": commit, **versions, "python": platform.python_version(), "machine": _machine()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
