"""Programs that a federated run starts: none outlives it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

pytest.importorskip("flwr")

from weldnet.errors import FederatedError
from weldnet.federated.flower._guardian import marked
from weldnet.federated.flower._processes import Processes, free_port, require_free


def test_programs_end_with_the_block_even_their_children(tmp_path):
    child = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    code = f"import subprocess, sys, time; subprocess.Popen({child}, start_new_session=True); print('up', flush=True)"
    with Processes(tmp_path, os.environ) as programs:
        program = programs.start("nested", [sys.executable, "-c", f"{code}; time.sleep(99)"])
        until(lambda: program.said() == ["up"])
        mark = programs.env["WELDNET_FEDERATION"]
        until(lambda: len(alive(mark)) == 2)
    assert not program.running
    until(lambda: not alive(mark))


def test_programs_end_when_their_parent_is_killed(tmp_path):
    code = f"""
import os, sys, time
from weldnet.federated.flower._processes import Processes
programs = Processes({str(tmp_path)!r}, os.environ)
programs.start("child", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(99)"])
print(programs.env["WELDNET_FEDERATION"], flush=True)
time.sleep(99)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    mark = parent.stdout.readline().strip()
    until(lambda: len(alive(mark)) == 1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not alive(mark))


def kill_and_wait(code: str, seconds: float) -> None:
    """Run code that prints the mark of its one program, kill it, and wait until the program is gone too."""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    mark = parent.stdout.readline().strip()
    assert len(alive(mark)) == 1
    parent.kill()
    parent.wait()
    until(lambda: not alive(mark), seconds)


def test_what_programs_start_in_turn_ends_when_their_command_is_killed(tmp_path):
    """The server app is started by Flower, in a session of its own, with nobody to tell it."""
    app = (
        "from weldnet.federated.flower._processes import end_with_owner; end_with_owner(); import time; time.sleep(99)"
    )
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {app!r}], start_new_session=True)"
    code = f"""
import os, sys, time
from weldnet.federated.flower._processes import Processes
programs = Processes({str(tmp_path)!r}, os.environ)
programs.start("starter", [sys.executable, "-c", {starter!r}]).process.wait()
print(programs.env["WELDNET_FEDERATION"], flush=True)
time.sleep(99)
"""
    kill_and_wait(code, 120)


def test_a_program_that_listens_to_nobody_is_ended_by_the_guardian(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    code = f"""
import os, sys, time
from pathlib import Path
from weldnet.federated.flower import _processes
_processes.GRACE = 1.0
programs = _processes.Processes({str(tmp_path)!r}, os.environ)
program = programs.start("deaf", [sys.executable, "-c", {deaf!r}])
while program.said() != ["up"]:
    time.sleep(0.1)
print(programs.env["WELDNET_FEDERATION"], flush=True)
time.sleep(99)
"""
    kill_and_wait(code, 60)


def test_a_program_that_is_not_there_is_one_line(tmp_path):
    with Processes(tmp_path, os.environ) as programs, pytest.raises(FederatedError, match=r"pip install"):
        programs.start("no", [str(tmp_path / "no-such-program")])


def test_a_port_in_use_is_named():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FederatedError, match=f"port {port} of 127.0.0.1 cannot be used: address already in use"):
            require_free(port)
    require_free(free_port())


def alive(mark: str) -> list[int]:
    return [number for number in marked(f"WELDNET_FEDERATION={mark}") if number != os.getpid()]


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
