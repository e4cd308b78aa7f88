"""The server app: the rounds of a config's federation, carried by whatever grid Flower gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from weldnet.federated import FedAvg, Federation, Order, Server
from weldnet.federated.flower._messenger import Messenger
from weldnet.federated.flower._processes import end_with_owner
from weldnet.federated.flower._settings import RunSettings
from weldnet.federated.flower._strategy import refuse_masked
from weldnet.federated.flower._wire import to_record
from weldnet.records import Record

__all__ = ["run_rounds", "server_app"]

_LOG = logging.getLogger("weldnet.federated")
_KEYS = ("arrays", "config")

server_app = ServerApp()
"""Runs the federation that the run config describes; records, state and model go to its ``out`` folder."""


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    end_with_owner()
    settings = RunSettings.from_flower(context.run_config)
    server = run_rounds(grid, settings)
    context.state["done"] = MetricRecord({"rounds": server.round})


def run_rounds(
    grid: Grid,
    settings: RunSettings,
    on_round: Callable[[Record], None] = lambda record: None,
    federation: Federation | None = None,
) -> Server:
    """Let the clients behind a grid work, round after round, until the server is done.

    Args:
        grid: Flower's, or a :class:`LocalGrid`.
        settings: of the run.
        on_round: is shown each round's record.
        federation: of this very config, if there is one already.

    Returns:
        The server after the last round; its model is in the run's folder.

    Raises:
        FederatedError: too few nodes, a folder that holds another run, or every round was skipped.
        UsageError: replies are masked.
    """
    federation = federation or Federation(settings.config)
    server = Server(federation, settings.folder, resume=settings.resume)
    expected = settings.nodes or settings.config.clients
    names = federation.clients
    messenger = Messenger(
        expected,
        min(settings.config.min_replies, expected),
        settings.patience,
        lambda partition: names[partition] if partition < len(names) else f"partition {partition}",
    )
    while not server.done:
        orders = server.orders()
        nodes = messenger.wait(grid)
        contents = _contents(orders, len(names), nodes, messenger, grid, server.run)
        messages = messenger.messages(contents, orders[0].round, _KEYS)
        replies = messenger.read(grid.send_and_receive(messages, timeout=settings.timeout or None))
        if replies.masked:
            aligned = settings.config.align_at == "client"
            rule = FedAvg() if aligned else settings.config.make_rule()
            refuse_masked(rule, settings.config.make_optimiser(), always=True)
        record = server.receive(replies.updates, {entry.client: entry.reason for entry in replies.failed})
        if record is not None:
            _LOG.info("%s", describe(record))
            on_round(record)
    server.finish()
    return server


def _contents(
    orders: Sequence[Order], clients: int, nodes: Sequence[int], messenger: Messenger, grid: Grid, run: str
) -> dict[int, tuple[ArrayRecord, Mapping[str, Any]]]:
    """Return what each node is sent. Where all clients get the same, nodes need not be asked who they are first."""
    packed = {id(order.state): to_record(order.state) for order in orders}
    if len(orders) == clients and len(packed) == 1:
        return {node: (packed[id(orders[0].state)], _config(orders[0], run)) for node in nodes}
    mine, names = {order.client: order for order in orders}, messenger.named(nodes, grid)
    found = ((node, mine[names[node]]) for node in nodes if names[node] in mine)
    return {node: (packed[id(order.state)], _config(order, run)) for node, order in found}


def _config(order: Order, run: str) -> dict[str, Any]:
    """Return what goes with the weights: lists of words may be long, and empty ones have no type."""
    return {"phase": order.phase, "frozen": json.dumps(sorted(order.frozen)), "run": run}


def describe(record: Record) -> str:
    """Say on one line what became of a round.

    >>> record = Record(
    ...     kind="round",
    ...     cell={"round": 2},
    ...     values={"replies": 4, "accuracy": 0.91, "moved": 0.004, "objective": 3.25, "seconds": 0.7},
    ...     extra={"missing": ["client-03"], "failed": {}, "dropped": {"client-01": "NaN in w"}, "skipped": ""},
    ... )
    >>> print(describe(record))
    round 2: 4 clients; accuracy 91.00%; 0.40% of the units moved; objective 3.25; no answer from client-03; without \
client-01 (NaN in w); aggregated in 0.7 s
    """
    values, extra = record.values, record.extra
    skipped = extra.get("skipped")
    parts = [f"skipped, the model stays ({skipped})" if skipped else f"{values.get('replies', 0):.0f} clients"]
    for name, shown in _SHOWN.items():
        value = values.get(name)
        if value is not None:
            parts.append(shown.format(value))
    if extra.get("missing"):
        parts.append(f"no answer from {', '.join(extra['missing'])}")
    left_out = {**extra.get("failed", {}), **extra.get("dropped", {})}
    parts += [f"without {client} ({reason})" for client, reason in sorted(left_out.items())]
    if values.get("seconds") is not None:
        parts.append(f"aggregated in {values['seconds']:.1f} s")
    return f"round {record.cell['round']}: " + "; ".join(parts)


_SHOWN = {
    "accuracy": "accuracy {:.2%}",
    "loss": "loss {:.4f}",
    "moved": "{:.2%} of the units moved",
    "objective": "objective {:.6g}",
}
