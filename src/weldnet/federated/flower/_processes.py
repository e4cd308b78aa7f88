"""Other programs that a command starts, watches and stops: none outlives it, and what they said is kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from weldnet.errors import FederatedError
from weldnet.federated.flower import _guardian
from weldnet.federated.flower._guardian import gone, marked

__all__ = ["Processes", "Program", "end_with_owner", "free_port", "require_free"]

GRACE = 10.0
"""Seconds that a program has to end by itself."""

_PR_SET_PDEATHSIG = 1
_MARK = "WELDNET_FEDERATION"
_OWNER = "WELDNET_FEDERATION_OWNER"


@final
@dataclass(frozen=True, eq=False)
class Program:
    """A program that was started: its name, its process and the file that it writes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        """Whether it is still there."""
        return self.process.poll() is None

    def said(self, lines: int = 20) -> list[str]:
        """Return the last lines that it wrote."""
        try:
            return self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return []


@final
class Processes:
    """Programs that end with the block that started them.

    Each gets a session of its own, so that its children are stopped with it. Where the system can do it (Linux), it is
    asked to end when this process dies, even by a signal that cannot be caught; whatever its children started is found
    by a mark in the environment, and ended by a guardian if this process cannot do it any more.

    Args:
        folder: where each program's output goes, as ``NAME.log``.
        env: the programs' environment.

    >>> import sys, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Processes(folder, {}) as programs:
    ...     program = programs.start("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"])
    ...     program.running
    True
    >>> program.running
    False
    """

    def __init__(self, folder: str | os.PathLike[str], env: Mapping[str, str]) -> None:
        self.folder, self._mark = Path(folder), uuid.uuid4().hex
        self.env = {**env, _MARK: self._mark, _OWNER: str(os.getpid())}
        self.programs: list[Program] = []
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str]) -> Program:
        """Start a program.

        Raises:
            FederatedError: there is no such program.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._guardian is None and sys.platform == "linux":
            self._guardian = _start_guardian(f"{_MARK}={self._mark}")
        log = self.folder / f"{name}.log"
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    start_new_session=True,
                    preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
                )
        except OSError as error:
            raise FederatedError(
                f"{command[0]} does not start ({error}); is it installed? pip install 'weldnet[federated]'"
            ) from error
        self.programs.append(Program(name, process, log))
        return self.programs[-1]

    def stop(self) -> None:
        """End all programs, the last one first: politely, and after a while by force."""
        for program in reversed(self.programs):
            _signal(program, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for program in reversed(self.programs):
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(max(0.1, deadline - time.monotonic()))
        # What a program started may be there still when the program itself is gone.
        for program in reversed(self.programs):
            _signal(program, signal.SIGKILL)
            program.process.wait()
        for process in marked(f"{_MARK}={self._mark}"):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
            self._guardian = None


@functools.cache
def end_with_owner() -> None:
    """Let this process end when the command ends that it works for, however that ends.

    A program may start others in turn, which nobody asks to end when the command is killed by force; a server that goes
    on alone would write into a folder that another one has taken over. Nothing happens where there is no such command.
    """
    owner = int(os.environ.get(_OWNER, "0"))
    if owner and owner != os.getpid():
        threading.Thread(target=_watch, args=(owner,), daemon=True).start()


def _watch(owner: int) -> None:
    while not gone(owner):
        time.sleep(0.5)
    os._exit(1)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now.

    >>> require_free(free_port())
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Make sure that a port can be had.

    Raises:
        FederatedError: somebody listens on it, or it may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise FederatedError(
                f"port {port} of {host} cannot be used: {why.lower()}; give another one, or none to let one be chosen"
            ) from error


def _signal(program: Program, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(program.process.pid, number)


def _start_guardian(mark: str) -> subprocess.Popen[bytes]:
    """Start a small program that looks after the others if this process is killed."""
    words = [str(Path(_guardian.__file__)), str(os.getpid()), mark, str(GRACE)]
    null = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-I", *words], stdin=null, stdout=null, stderr=null, start_new_session=True, env={}
    )


def _die_with_parent():  # pyright: ignore[reportUnknownParameterType]
    """Return what a child runs first: ask for SIGTERM when this process dies, and see that it has not died yet."""
    parent, library = os.getpid(), ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
