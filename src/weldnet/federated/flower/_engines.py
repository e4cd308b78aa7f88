"""The engines: the same rounds in this process, in Flower's simulation with Ray, or in a real deployment."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import torch
from flwr.app import Context, RecordDict

from weldnet.errors import FederatedError, UsageError
from weldnet.federated import CHECKPOINT, CLIENTS, MODEL, FederatedConfig, Federation
from weldnet.federated.flower._client import client_app
from weldnet.federated.flower._deployment import Certificates, Deployment
from weldnet.federated.flower._flwr import Flwr, Run, link_config
from weldnet.federated.flower._folder import write_app
from weldnet.federated.flower._grid import LocalGrid
from weldnet.federated.flower._serve import run_rounds
from weldnet.federated.flower._settings import RunSettings
from weldnet.records import FILE, Record, read

__all__ = ["ENGINES", "Engine", "Plan", "federate"]

Engine = Literal["local", "ray", "superlink"]
ENGINES: tuple[str, ...] = get_args(Engine)
"""The engines by name."""

FOLDER = "flower"
"""Where Flower's own files go, in a run's folder: its home, logs, database and the app."""

_ASK = 10.0  # seconds between two questions about a run; each starts a process
_TRIES = 3  # questions in a row that may go unanswered: on a busy machine one may take too long
_TICK = 0.5

Tell = Callable[[str], None]
OnRound = Callable[[Record], None]


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a federation is run.

    Args:
        engine: ``local``, ``ray`` or ``superlink``.
        nodes: how many of the clients there are, the first ones; all if None.
        timeout: seconds that clients have to answer; no limit if None.
        patience: seconds to wait for nodes to come.
        resume: go on from what is in the run's folder.
        join: address of a SuperLink that runs already; its own SuperNodes are the clients.
        port: of the SuperLink that is started; a free one if None.
        certificates: for TLS, of the SuperLink that is started, or the authority of the one that is joined.
        authenticate: let only SuperNodes in whose keys are registered.

    Raises:
        UsageError: options that do not go together.
    """

    engine: Engine = "local"
    nodes: int | None = None
    timeout: float | None = None
    patience: float = 600.0
    resume: bool = False
    join: str | None = None
    port: int | None = None
    certificates: Path | None = None
    authenticate: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"unknown engine {self.engine!r}; give {', '.join(ENGINES)}")
        only = {"join": self.join, "port": self.port, "certificates": self.certificates, "keys": self.authenticate}
        given = [name for name, value in only.items() if value]
        if given and self.engine != "superlink":
            raise UsageError(f"the engine {self.engine} has no {given[0]}; give --engine superlink")
        if self.join and (self.port or self.authenticate):
            raise UsageError("a SuperLink that is joined has a port and keys of its own; leave --port and --keys out")
        if self.nodes is not None and self.nodes < 1:
            raise UsageError(f"nodes is {self.nodes}; give 1 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"timeout is {self.timeout:g} seconds; give more than 0, or leave it out for no limit")
        if not self.patience >= 0:
            raise UsageError(f"patience is {self.patience:g} seconds; give 0 or more")

    def settings(self, config: FederatedConfig, out: Path) -> RunSettings:
        """Return what the run's server and nodes are told."""
        nodes = self.nodes or config.clients
        if nodes > config.clients:
            raise UsageError(f"nodes is {nodes}, but the config has {config.clients} clients; give that many or fewer")
        if config.min_replies > nodes:
            raise UsageError(f"min_replies is {config.min_replies}, but there are {nodes} nodes; lower it")
        return RunSettings(
            config=config,
            out=str(out),
            resume=self.resume,
            nodes=nodes,
            patience=self.patience,
            timeout=self.timeout or 0.0,
            state="" if self.join else str(out / CLIENTS),
        )


def federate(
    config: FederatedConfig,
    out: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    on_round: OnRound = lambda record: None,
    tell: Tell = lambda line: None,
) -> Path:
    """Run a federation to its end on one of the engines; all give the same weights, bit for bit.

    Args:
        config: the settings.
        out: the run's folder: ``records.jsonl``, the server's state, and at the end the global model.
        plan: how to run it; in this process if None.
        on_round: is shown each round's record.
        tell: is told what a person should know.

    Returns:
        The file of the global model.

    Raises:
        FederatedError: the run failed (with Flower's reason), or a program that it needs does not start or run.
        UsageError, ConfigError, DataError: settings that cannot be meant.
    """
    plan, out = plan or Plan(), Path(out).resolve()
    settings = plan.settings(config, out)
    if (out / CHECKPOINT).exists() and not plan.resume:
        raise FederatedError(f"{out} holds a run already; resume it, or give another folder")
    if plan.engine == "local":
        _run_here(settings, on_round)
    elif plan.join:
        _join(settings, plan, plan.join, on_round, tell)
    else:
        _deploy(settings, plan, on_round, tell)
    return out / MODEL


def _run_here(settings: RunSettings, on_round: OnRound) -> None:
    flat = settings.to_flower()
    contexts = {
        number + 1: Context(0, number + 1, {"partition-id": number}, RecordDict(), flat)
        for number in range(settings.nodes)
    }
    federation = Federation(settings.config)
    federation.require_parts()
    with _quiet_flower():
        run_rounds(LocalGrid(client_app, contexts), settings, on_round, federation)


def _deploy(settings: RunSettings, plan: Plan, on_round: OnRound, tell: Tell) -> None:
    folder = settings.folder / FOLDER
    # What another SuperLink left there is of runs that are over, one way or another.
    for old in folder.glob("superlink.db*"):
        old.unlink()
    shutil.rmtree(folder / "app", ignore_errors=True)
    simulated = plan.engine == "ray"
    nodes = [] if simulated else [{"partition-id": k, "num-partitions": settings.nodes} for k in range(settings.nodes)]
    certificates = Certificates(plan.certificates) if plan.certificates else None
    tell(f"starting a SuperLink and {'Ray' if simulated else f'{len(nodes)} SuperNodes'}; logs are in {folder}")
    with Deployment(
        folder,
        nodes,
        simulation=simulated,
        port=plan.port,
        certificates=certificates,
        authenticate=plan.authenticate,
        tell=tell,
    ) as deployment:
        app = write_app(folder / "app", settings)
        simulation = _simulation(settings.nodes, settings.config.device) if simulated else None
        _follow(deployment.flwr, app, settings, simulation, deployment.watch, on_round, tell)


def _join(settings: RunSettings, plan: Plan, address: str, on_round: OnRound, tell: Tell) -> None:
    folder = settings.folder / FOLDER
    shutil.rmtree(folder / "app", ignore_errors=True)
    authority = plan.certificates / "ca.crt" if plan.certificates else None
    if authority is not None and not authority.is_file():
        raise UsageError(f"there is no {authority}; give the folder that holds the authority's certificate")
    flwr = Flwr(folder / "home", "joined", link_config(address, authority))
    app = write_app(folder / "app", settings)
    _follow(flwr, app, settings, None, lambda: None, on_round, tell)
    if not (settings.folder / MODEL).exists():
        tell(f"the run's files are in {settings.folder} on the SuperLink's machine, which is another one")


def _simulation(nodes: int, device: str) -> dict[str, int | float]:
    """One core a client, and no more clients at once than there are cores or clients; they share the GPUs.

    Ray hides GPUs from those who have no share.
    """
    cores = min(nodes, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found: dict[str, int | float] = {"num-supernodes": nodes, "init-args-num-cpus": max(1, cores)}
    found["client-resources-num-cpus"] = 1
    gpus = torch.cuda.device_count() if torch.device(device).type == "cuda" else 0
    if not gpus:
        return found
    # Rounded down, so that all have room; Ray counts in steps of 0.0001.
    share = min(10_000, 10_000 * gpus // max(1, cores)) / 10_000
    return {**found, "init-args-num-gpus": gpus, "client-resources-num-gpus": share}


def _follow(
    flwr: Flwr,
    app: Path,
    settings: RunSettings,
    simulation: Mapping[str, int | float] | None,
    watch: Callable[[], None],
    on_round: OnRound,
    tell: Tell,
) -> None:
    """Start the run and watch it to its end."""
    progress = _Progress(settings.folder, on_round)
    number = flwr.run(app, {}, simulation)
    tell(f"run {number} has begun")
    try:
        run = _wait(flwr, number, watch, progress)
    except BaseException:
        with contextlib.suppress(FederatedError):
            flwr.stop(number)
        raise
    progress.show()
    if not run.completed:
        raise FederatedError(
            f"run {number} ended as {run.status}: {run.details or 'no reason given'}; {_logs(settings)}"
        )


def _wait(flwr: Flwr, number: str, watch: Callable[[], None], progress: _Progress) -> Run:
    asked, unanswered = time.monotonic(), 0
    while True:
        watch()
        progress.show()
        if time.monotonic() - asked >= (_ASK if not progress.finished else _TICK):
            try:
                run = flwr.show(number)
            except FederatedError:
                unanswered += 1
                if unanswered >= _TRIES:
                    raise
            else:
                unanswered = 0
                if run.finished:
                    return run
            asked = time.monotonic()
        time.sleep(_TICK)


def _logs(settings: RunSettings) -> str:
    return f"the logs are in {settings.folder / FOLDER}"


class _Progress:
    """Shows the rounds that a server in another process records."""

    def __init__(self, out: Path, on_round: OnRound) -> None:
        self._out, self._on_round = out, on_round
        self._model = self._stamp()
        self._size = 0
        self._seen = {record.key for record in self._rounds()}

    @property
    def finished(self) -> bool:
        """Whether the server has written the model since."""
        return self._stamp() != self._model

    def show(self) -> None:
        """Show what is new."""
        for record in self._rounds():
            if record.key not in self._seen:
                self._seen.add(record.key)
                self._on_round(record)

    def _rounds(self) -> list[Record]:
        file = self._out / FILE
        size = file.stat().st_size if file.exists() else 0
        if size == self._size:
            return []
        self._size = size
        return read(file).of("round")

    def _stamp(self) -> int:
        file = self._out / MODEL
        return file.stat().st_mtime_ns if file.exists() else 0


@contextlib.contextmanager
def _quiet_flower() -> Iterator[None]:
    """Let Flower say only what is wrong."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
