"""Flower's command line, called as a person would: start a run, and ask what became of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from weldnet.errors import FederatedError

__all__ = ["Flwr", "Run", "as_toml", "environment", "link_config"]

TIMEOUT = 180.0
"""Seconds that one call may take."""

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_UNLESS_SAID = {
    # Ray lets its workers give way to everything else on the machine (15): beside other work they hardly move.
    "RAY_worker_niceness": "0",
    # Messages pass through Ray's object store; what does not fit goes to the disk. Ray takes 30% of the memory.
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(1 << 30),
}


@final
@dataclass(frozen=True)
class Run:
    """What Flower says of a run.

    Args:
        number: its id.
        status: such as ``running`` or ``finished:completed``.
        details: why it failed, if it did.
    """

    number: str
    status: str
    details: str = ""

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether it is over and good."""
        return self.status == "finished:completed"


@final
class Flwr:
    """The ``flwr`` command with a home of its own, so that it meets nobody else's SuperLink.

    Args:
        home: Flower's home (``FLWR_HOME``); made if it is not there.
        link: a name for the SuperLink.
        config: its address, as in Flower's ``config.toml``.
    """

    def __init__(self, home: str | os.PathLike[str], link: str, config: str) -> None:
        self.home, self._link = Path(home), link
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "{link}"\n\n[superlink.{link}]\n{config}')

    def run(
        self, app: str | os.PathLike[str], run_config: Mapping[str, Any], federation: Mapping[str, Any] | None = None
    ) -> str:
        """Start a run of an app folder; return its id.

        Args:
            app: the folder.
            run_config: replaces values of the app's own.
            federation: how to simulate, such as ``{"num-supernodes": 5}``.

        Raises:
            FederatedError: it is not accepted.
        """
        words = ["run", str(app), self._link, "--format", "json"]
        if run_config:
            file = self.home / "run.toml"
            file.write_text(as_toml(run_config), encoding="utf-8")
            words += ["--run-config", str(file)]
        if federation:
            words += ["--federation-config", " ".join(as_toml(federation).replace(" = ", "=").splitlines())]
        return str(self._json(words)["run-id"])

    def show(self, run: str) -> Run:
        """Ask what became of a run: the truth, where ``flwr run`` ends well even when the run failed."""
        found = self._json(["list", self._link, "--run-id", run, "--format", "json"])["runs"][0]
        details = found.get("status-details") or ""
        return Run(run, found["status"], "" if details == "N/A" else " ".join(details.split()))

    def stop(self, run: str) -> None:
        """End a run."""
        self._call(["stop", run, self._link])

    def register(self, public_key: str | os.PathLike[str]) -> None:
        """Let a SuperNode with this key in."""
        self._json(["supernode", "register", str(public_key), self._link, "--format", "json"])

    def _json(self, words: list[str]) -> dict[str, Any]:
        done = self._call(words)
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {}
        if not answer.get("success"):
            said = answer.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise FederatedError(f"flwr {words[0]} failed: {' '.join(str(said).split())}")
        return answer

    def _call(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / "flwr"
        command = [str(program) if program.exists() else "flwr", *words]
        env = environment(self.home)
        try:
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except OSError as error:
            raise FederatedError(
                f"flwr does not start ({error}); is it installed? pip install 'weldnet[federated]'"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise FederatedError(f"flwr {words[0]} did not end within {TIMEOUT:.0f} s") from error


def environment(home: str | os.PathLike[str]) -> dict[str, str]:
    """Return this process's environment for Flower's programs: quiet, offline, with a private home.

    Ray's workers get the same priority as this process and a bounded object store, unless the environment says else.

    >>> environment("/x")["FLWR_HOME"]
    '/x'
    """
    # Flower's programs start others by name: this environment's must be the ones that are found.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**_UNLESS_SAID, **os.environ, **_QUIET, "FLWR_HOME": str(home), "PATH": path}


def link_config(address: str, authority: Path | None = None) -> str:
    """Return the lines of Flower's ``config.toml`` for a SuperLink.

    >>> print(link_config("127.0.0.1:8000"), end="")
    address = "127.0.0.1:8000"
    insecure = true
    """
    security = f'root-certificates = "{authority}"' if authority else "insecure = true"
    return f'address = "{address}"\n{security}\n'


def as_toml(values: Mapping[str, Any]) -> str:
    """Write words, numbers and truth values as TOML.

    >>> print(as_toml({"resume": True, "lr": 0.5, "note": 'a "b"'}), end="")
    resume = true
    lr = 0.5
    note = "a \\"b\\""
    """
    return "".join(f"{key} = {_literal(value)}\n" for key, value in values.items())


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False)
