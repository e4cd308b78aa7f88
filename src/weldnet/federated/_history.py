"""What a run writes down of itself: its settings, what became of every round, and why there is no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from weldnet.federated._aggregate import Aggregated
from weldnet.federated._config import FederatedConfig
from weldnet.federated._federation import Order
from weldnet.federated._update import ClientUpdate
from weldnet.records import Record, read

__all__ = ["Exchanged", "describe_round", "failure", "introduction"]

Where = Mapping[str, str | int | float | bool | None]


@final
@dataclass
class Exchanged:
    """What went between server and clients in a round so far; it may have several exchanges.

    Args:
        failed: clients that answered with an error, and which.
        missing: clients that did not answer.
        down: bytes of tensors to the clients.
        up: bytes of tensors from the clients.
    """

    failed: dict[str, str] = field(default_factory=dict[str, str])
    missing: set[str] = field(default_factory=set[str])
    down: int = 0
    up: int = 0

    def add(self, asked: Sequence[Order], updates: Sequence[ClientUpdate], failed: Mapping[str, str]) -> None:
        """Add one exchange."""
        self.failed |= dict(failed)
        self.missing |= {order.client for order in asked} - {update.client for update in updates} - failed.keys()
        self.down += sum(_bytes(order.state) for order in asked)
        self.up += sum(_bytes(update.state) for update in updates)


def introduction(config: FederatedConfig, where: Where) -> Record:
    """Return the record that a run begins with."""
    return Record(
        kind="run",
        key=config.key(),
        cell=_cell(config),
        extra={"title": "Federated learning", "config": config.model_dump()},
        seed=config.seed,
        where=where,
    )


def describe_round(
    config: FederatedConfig,
    number: int,
    found: Aggregated,
    updates: Sequence[ClientUpdate],
    exchanged: Exchanged,
    scores: Mapping[str, float],
    where: Where,
) -> Record:
    """Return the record of a round.

    Args:
        config: of the run.
        number: of the round.
        found: how it ended.
        updates: what clients sent in its last exchange.
        exchanged: what went to and fro in all of them.
        scores: of the global model, if it was evaluated.
        where: it was measured.
    """
    used = [update for update in updates if update.client in found.clients]
    values: dict[str, float | None] = {
        **scores,
        **found.stats,
        **_over_clients(used),
        "replies": len(found.clients),
        "dropped": len(found.dropped),
        "failed": len(exchanged.failed),
        "missing": len(exchanged.missing),
        "bytes_down": exchanged.down,
        "bytes_up": exchanged.up,
    }
    extra = {
        "clients": list(found.clients),
        "shares": dict(found.shares),
        "moved": dict(found.moved) or {u.client: u.values["moved"] for u in used if "moved" in u.values},
        "dropped": {entry.client: entry.reason for entry in found.dropped},
        "failed": exchanged.failed,
        "missing": sorted(exchanged.missing),
        "skipped": found.skipped,
    }
    return Record(
        kind="round",
        key=_key(config, number),
        cell={**_cell(config), "round": number},
        values=values,
        extra=extra,
        seed=config.seed,
        where=where,
    )


def failure(out: Path, config: FederatedConfig, number: int) -> str:
    """Say why a run has no model after some rounds, by the record of the last one."""
    said = f"no round of {number} gave a model"
    for record in [record for record in read(out).of("round") if record.key == _key(config, number)][-1:]:
        extra = record.extra
        reasons = {**dict.fromkeys(extra["missing"], "no answer"), **extra["failed"], **extra["dropped"]}
        clients = [f"{client}: {reason}" for client, reason in sorted(reasons.items())]
        more = [f"and {len(clients) - 1} more"] if len(clients) > 1 else []
        said = "; ".join([f"{said} ({extra['skipped']})", *clients[:1], *more])
    return f"{said}; mend that, and run it again"


def _key(config: FederatedConfig, number: int) -> str:
    return f"{config.key()}-{number}"


def _cell(config: FederatedConfig) -> dict[str, Any]:
    return {
        "dataset": config.dataset,
        "partition": config.partition.label,
        "architecture": config.model + (" of several widths" if config.own_model_options else ""),
        "clients": config.clients,
        "rule": config.make_rule().name,
        "algorithm": config.make_algorithm().name,
        "server_optimiser": config.make_optimiser().name,
        "initialisation": config.initialisation,
        "align_at": config.align_at,
        "repair": config.repair,
        "local_epochs": config.local.epochs,
        "participation": config.participation,
        "seed": config.seed,
    }


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _over_clients(updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """The means of what clients measured, by samples; of seconds and shares moved what a reader asks for."""
    found: dict[str, float] = {}
    total = sum(update.examples for update in updates)
    for name in ("loss", "train_accuracy"):
        known = [(u.values[name], u.examples) for u in updates if name in u.values]
        if known and len(known) == len(updates):
            found["train_" + name.removeprefix("train_")] = sum(v * n for v, n in known) / total
    seconds = [u.values["seconds"] for u in updates if "seconds" in u.values]
    moved = [u.values["moved"] for u in updates if "moved" in u.values]
    if seconds:
        found["client_seconds"] = sum(seconds)
    if moved:
        found |= {"moved": sum(moved) / len(moved), "moved_max": max(moved)}
    return found
