"""Flower's own programs on this machine: a SuperLink, SuperNodes beside it, and a run watched to its end."""

from __future__ import annotations

import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, final

from weldnet.errors import FederatedError, UsageError
from weldnet.federated.flower._flwr import Flwr, environment, link_config
from weldnet.federated.flower._keys import write_key
from weldnet.federated.flower._processes import Processes, Program, free_port, require_free

__all__ = ["Certificates", "Deployment"]

HOST = "127.0.0.1"
READY = 120.0
"""Seconds that a SuperLink may take to answer."""
RESTARTS = 3
"""How often one SuperNode is started again."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@final
@dataclass(frozen=True)
class Certificates:
    """The files of a TLS server, under the names that Flower's documentation gives them.

    Args:
        folder: holds ``ca.crt``, ``server.pem`` and ``server.key``; the certificate must name 127.0.0.1.

    Raises:
        UsageError: a file is missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        for file in (self.authority, self.certificate, self.key):
            if not file.is_file():
                raise UsageError(f"there is no {file}; give a folder with ca.crt, server.pem and server.key")

    @property
    def authority(self) -> Path:
        """Who signed."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """What the server shows."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """What only the server has."""
        return self.folder / "server.key"


@final
class Deployment:
    """A SuperLink with its SuperNodes, on ports of their own and with a home of its own; ended with the block.

    Args:
        folder: logs, keys, the SuperLink's database and Flower's home go here.
        nodes: settings of each SuperNode, such as ``{"partition-id": 0}``; none where the SuperLink simulates.
        simulation: whether the SuperLink runs the clients itself, with Ray.
        port: the SuperLink's; one that is free if None.
        certificates: for TLS; plain HTTP on the loopback if None.
        authenticate: whether SuperNodes must have a registered key; theirs are made and registered here.
        tell: what to call with a line that a person should know.

    Raises:
        FederatedError: a port is taken, or a program does not start.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        nodes: Sequence[Mapping[str, Any]] = (),
        *,
        simulation: bool = False,
        port: int | None = None,
        certificates: Certificates | None = None,
        authenticate: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        _require_http()
        self.folder = Path(folder).resolve()
        self.certificates, self._authenticate, self._tell = certificates, authenticate, tell
        if port is not None:
            require_free(port, HOST)
        self.address = f"{HOST}:{port or free_port(HOST)}"
        self._simulation, self._settings = simulation, [dict(node) for node in nodes]
        self.flwr = Flwr(self.folder / "home", "own", link_config(self.address, self._authority))
        self.programs = Processes(self.folder, environment(self.folder / "home"))
        self.nodes: list[Program] = []
        self._restarts = [0] * len(self._settings)

    @property
    def _authority(self) -> Path | None:
        return self.certificates.authority if self.certificates else None

    def __enter__(self) -> Deployment:
        try:
            self._link = self.programs.start("superlink", self._link_command())
            self._wait_until_ready()
            for number in range(len(self._settings)):
                if self._authenticate:
                    self.flwr.register(write_key(self._key(number)))
                self.nodes.append(self._start_node(number))
        except BaseException:
            self.programs.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.programs.stop()

    def watch(self) -> None:
        """See that everything still runs; start SuperNodes that ended again.

        Raises:
            FederatedError: the SuperLink ended, or a SuperNode that was started again before, too often.
        """
        if not self._link.running:
            raise FederatedError(_ended(self._link))
        for number, node in enumerate(self.nodes):
            if node.running:
                continue
            self._restarts[number] += 1
            if self._restarts[number] > RESTARTS:
                raise FederatedError(f"{_ended(node)}; it was started {RESTARTS + 1} times")
            self._tell(f"{_ended(node)}; starting it again")
            self.nodes[number] = self._start_node(number)

    def node_command(self, settings: Mapping[str, Any], key: Path | None = None) -> list[str]:
        """Return what starts a SuperNode that belongs to this SuperLink."""
        written = " ".join(f"{name}={_literal(value)}" for name, value in settings.items())
        security = ["--root-certificates", str(self._authority)] if self._authority else ["--insecure"]
        identity = ["--auth-supernode-private-key", str(key)] if key else []
        link, own = ["--superlink", self.address], ["--port", str(free_port(HOST))]
        return [*_program("flower-supernode"), *security, *identity, *link, *own, "--node-config", written]

    def _start_node(self, number: int) -> Program:
        key = self._key(number) if self._authenticate else None
        return self.programs.start(f"supernode-{number}", self.node_command(self._settings[number], key))

    def _key(self, number: int) -> Path:
        return self.folder / "keys" / f"supernode-{number}"

    def _link_command(self) -> list[str]:
        host, port = self.address.split(":")
        command = [*_program("flower-superlink"), "--host", host, "--port", port]
        command += ["--database", str(self.folder / "superlink.db"), "--disable-runtime-dependency-installation"]
        if self._simulation:
            command.append("--simulation")
        if self._authenticate:
            command.append("--enable-supernode-auth")
        if not self.certificates:
            return [*command, "--insecure"]
        files = self.certificates
        return [
            *command,
            *("--ssl-ca-certfile", str(files.authority)),
            *("--ssl-certfile", str(files.certificate)),
            *("--ssl-keyfile", str(files.key)),
        ]

    def _wait_until_ready(self) -> None:
        scheme = "https" if self.certificates else "http"
        trust = ssl.create_default_context(cafile=str(self._authority)) if self._authority else None
        # The address is on this machine: a proxy has no say in it.
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)]
        opener = urllib.request.build_opener(*handlers)
        end, why = time.monotonic() + READY, "no answer"
        while time.monotonic() < end:
            if not self._link.running:
                raise FederatedError(_ended(self._link))
            try:
                with opener.open(f"{scheme}://{self.address}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                why = str(getattr(error, "reason", error))
            time.sleep(0.3)
        raise FederatedError(f"the SuperLink did not answer within {READY:.0f} s ({why}); see {self._link.log}")


def _require_http() -> None:
    """Refuse a Flower whose SuperLink has no single port yet; the engine in one process does not mind."""
    found = version("flwr")
    if [int(part) for part in found.split(".")[:2]] < [1, 40]:
        raise FederatedError(f"Flower {found} is older than 1.40, which the engines ray and superlink need; update it")


def _program(name: str) -> list[str]:
    """Return how to start a program of this environment, whatever PATH says."""
    beside = Path(sys.executable).parent / name
    return [str(beside) if beside.exists() else name]


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str | os.PathLike) else str(value).lower()


def _ended(program: Program) -> str:
    """Say how a program ended and why, on one line."""
    code = program.process.poll()
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"{program.name} ended ({how}): {_reason(program.said(60))}; its log is {program.log}"


def _reason(lines: Sequence[str]) -> str:
    """Return the last error among lines, with what follows it, or else the last line."""
    plain = [line for line in (_COLOUR.sub("", line).strip() for line in lines) if line]
    errors = [number for number, line in enumerate(plain) if "ERROR" in line or line.startswith("Exit Code")]
    chosen = plain[errors[-1] : errors[-1] + 3] if errors else plain[-1:]
    return " ".join(chosen) or "it said nothing"
