"""The rounds: the server that steps, evaluates, records and saves itself, and the plainest engine around it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from weldnet.checkpoints import WIDTHS, load, read_metadata, save
from weldnet.errors import FederatedError, UsageError, WeldnetError
from weldnet.evaluation import evaluate
from weldnet.federated._clients import ClientStore
from weldnet.federated._config import FederatedConfig
from weldnet.federated._federation import Federation, Order, fixed_threads
from weldnet.federated._history import Exchanged, describe_round, failure, introduction
from weldnet.federated._stages import make_course
from weldnet.federated._update import ClientUpdate
from weldnet.records import Record, append, where
from weldnet.structure import capture

__all__ = ["CHECKPOINT", "CLIENTS", "MODEL", "Server", "simulate"]

CHECKPOINT = "checkpoint.safetensors"
"""The server's state after its last round, in a run's folder."""

MODEL = "global.safetensors"
"""The global model of a finished run, in its folder."""

CLIENTS = "clients"
"""Where an engine on one machine keeps what clients keep, in a run's folder."""


@final
class Server:
    """The server of a run, between two rounds.

    Args:
        federation: what the config stands for.
        out: the run's folder: records, and the server's state after every round.
        resume: go on from the state in the folder, if there is one.

    Attributes:
        state: the global model.
        round: how many rounds are done.
        run: a word that no other run has; a resumed one keeps it. Clients that keep something keep it under this word.

    Raises:
        FederatedError: the folder holds another run, or one that was not asked to be resumed.

    Example:
        >>> import tempfile
        >>> config = FederatedConfig(dataset="digits", model_options={"sizes": [64, 8, 10]}, clients=2, rounds=1)
        >>> federation = Federation(config)
        >>> server = Server(federation, tempfile.mkdtemp())
        >>> while not server.done:
        ...     updates = [federation.work(order).update for order in server.orders()]
        ...     record = server.receive(updates)
        >>> server.round, sorted(record.cell)[:3]
        (1, ['algorithm', 'align_at', 'architecture'])
    """

    def __init__(self, federation: Federation, out: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.federation = federation
        self.config = federation.config
        self.out = Path(out)
        self.round, self._skipped = 0, 0
        self.run = uuid.uuid4().hex
        self.state: Mapping[str, Tensor] = federation.initial()
        self._course = make_course(federation)
        self._where, self._exchanged = where(), Exchanged()
        if (self.out / CHECKPOINT).exists():
            if not resume:
                raise FederatedError(f"{self.out} holds a run already; resume it, or give another folder")
            self._restore()
        else:
            append(self.out, [introduction(self.config, self._where)])

    @property
    def done(self) -> bool:
        """Whether all rounds are over."""
        return self.round >= self.config.rounds

    def orders(self) -> list[Order]:
        """Return what clients are asked now, sorted by client."""
        return self._course.orders(self.round + 1, self.state)

    def receive(self, updates: Sequence[ClientUpdate], failed: Mapping[str, str] | None = None) -> Record | None:
        """Make the next global model of what came back; record the round and save the server.

        Args:
            updates: in any order.
            failed: clients that answered with an error, and which. Those who are in neither are missing.

        Returns:
            The record of the round, which is in the run's folder; None if the round goes on with other orders.

        Raises:
            RecordError, CheckpointError: the folder cannot be written.
            FusionError, UsageError: the rule cannot work on these networks, whoever sent them.
        """
        self._exchanged.add(self.orders(), updates, failed or {})
        with fixed_threads(self.config.threads):
            found = self._course.receive(self.round + 1, self.state, updates)
            if found is None:
                return None
            self.round, self.state = self.round + 1, found.state
            self._skipped += bool(found.skipped)
            scores = self._evaluate()
        record = describe_round(self.config, self.round, found, updates, self._exchanged, scores, self._where)
        append(self.out, [record])
        self._save()
        self._exchanged = Exchanged()
        return record

    def finish(self) -> Path:
        """Write the global model beside the records; return the file, which ``weldnet.load_model`` reads.

        Raises:
            FederatedError: every round was skipped: there is no model but the one that the run began with.
        """
        if self._skipped == self.round:
            raise FederatedError(failure(self.out, self.config, self.round))
        path, blueprint = self.out / MODEL, self.federation.blueprint
        metadata = {"content": "weldnet-federated", "config": self.config.to_yaml()}
        if any(tuple(self.state[name].shape) != shape for name, shape in blueprint.structure.shapes.items()):
            wider = capture(blueprint.module(self.state), blueprint.example_input)
            metadata[WIDTHS] = json.dumps({space.name: space.size for space in wider.spaces})
        save(self.state, path, metadata=metadata)
        return path

    def _evaluate(self) -> dict[str, float]:
        if self.round % self.config.evaluate_every and self.round != self.config.rounds:
            return {}
        model = self.federation.blueprint.module(self.state)
        return evaluate(model, self.federation.test_data, device=self.config.device).scores

    def _save(self) -> None:
        tensors = {f"global/{name}": tensor for name, tensor in self.state.items()}
        tensors |= {f"course/{name}": tensor for name, tensor in self._course.tensors.items()}
        metadata = {
            "content": "weldnet-federated-state",
            "key": self.config.key(),
            "round": str(self.round),
            "skipped": str(self._skipped),
            "run": self.run,
        }
        save(tensors, self.out / CHECKPOINT, metadata=metadata)

    def _restore(self) -> None:
        path = self.out / CHECKPOINT
        metadata = read_metadata(path)
        if metadata.get("content") != "weldnet-federated-state":
            raise FederatedError(f"{path} is no state of a federated run; delete it to start afresh")
        if metadata["key"] != self.config.key():
            raise FederatedError(
                f"{path} is of a run with other settings; resume with those (only rounds and evaluate_every may "
                "change), or give another folder"
            )
        self.run, self._skipped = metadata.get("run", ""), int(metadata.get("skipped", "0"))
        tensors = load(path)
        parts: dict[str, dict[str, Tensor]] = {"global": {}, "course": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        if parts["global"].keys() != self.state.keys():
            names = sorted(parts["global"].keys() ^ self.state.keys())
            raise FederatedError(f"{path} is of another model ({names[0]!r}); give that model, or another folder")
        # Files sort their tensors; the order of sums, and with it their rounding, shall be the model's.
        self.round, self.state = int(metadata["round"]), {name: parts["global"][name] for name in self.state}
        self._course.restore(parts["course"], self.state)


def simulate(
    config: FederatedConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    federation: Federation | None = None,
    on_round: Callable[[Record], None] | None = None,
) -> Server:
    """Run clients and server in this process, one client after the other: the engine that all others agree with.

    Args:
        config: the settings.
        out: the run's folder: ``records.jsonl``, ``checkpoint.safetensors`` and, at the end, ``global.safetensors``.
        resume: go on where an interrupted run stopped; the result is bit-equal to that of a run that was not.
        federation: of this very config, if there is one already.
        on_round: is shown each round's record.

    Returns:
        The server after the last round.

    Raises:
        FederatedError: the folder holds another run, or one that was not asked to be resumed; or every round was
            skipped.
        ConfigError, DataError: model or data that cannot be had.
        UsageError: the federation is of another config.
    """
    federation = federation or Federation(config)
    if federation.config != config:
        raise UsageError("the federation is of another config; give one that was made of this config, or none")
    federation.require_parts()
    server = Server(federation, out, resume=resume)
    store = ClientStore(Path(out) / CLIENTS, server.run)
    while not server.done:
        updates: list[ClientUpdate] = []
        failed: dict[str, str] = {}
        for order in server.orders():
            try:
                worked = federation.work(order, store.load(order.client, order.round))
            except WeldnetError as error:
                failed[order.client] = str(error)
                continue
            store.save(order.client, order.round, worked.client_state)
            updates.append(worked.update)
        record = server.receive(updates, failed)
        if record is not None and on_round is not None:
            on_round(record)
    server.finish()
    return server
