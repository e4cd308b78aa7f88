"""The client app: one round of any client algorithm for each message."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import Any, final

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from weldnet.data import Split, load
from weldnet.errors import ConfigError
from weldnet.federated import ClientUpdate, FederatedConfig, Federation, Order
from weldnet.federated.flower._memory import ClientMemory
from weldnet.federated.flower._processes import end_with_owner
from weldnet.federated.flower._replies import CLASS_COUNTS, CLASSES, EXAMPLES, PARTITION, error_reply
from weldnet.federated.flower._settings import RunSettings
from weldnet.federated.flower._wire import to_record, to_state

__all__ = ["client_app"]

client_app = ClientApp()
"""Trains one round of the federation that the run config describes.

The node config says who the client is: ``partition-id`` (0, 1, ...). It may say ``data``, a name or folder for
:func:`weldnet.data.load`: then the client trains on all of its training split, and takes no part of the config's
dataset; and ``state``, a folder where it keeps what its algorithm needs in the next round (MOON's last network).
"""


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    end_with_owner()
    name = f"node {context.node_id}"
    try:
        partition = _partition(context)
        name = f"partition {partition}"
        settings = RunSettings.from_flower(context.run_config)
        federation = _federation(json.dumps(settings.config.model_dump()), str(context.node_config.get("data", "")))
        name = _client(federation, partition)
        order, run = _order(message, name), str(message.content.config_records["config"].get("run", ""))
        memory = ClientMemory(name, context, str(context.node_config.get("state", settings.state)), run)
        worked = federation.work(order, memory.before(order.round))
        memory.keep(order.round, worked.client_state)
        return _reply(message, partition, worked.update)
    except Exception as error:
        return error_reply(message, name, error)


def _order(message: Message, client: str) -> Order:
    said = message.content.config_records["config"]
    return Order(
        client=client,
        round=int(str(said["server-round"])),
        phase=int(str(said.get("phase", 0))),
        frozen=frozenset(json.loads(str(said.get("frozen", "[]")))),
        state=to_state(message.content.array_records["arrays"]),
    )


def _client(federation: Federation, partition: int) -> str:
    if partition >= len(federation.clients):
        raise ConfigError(
            f"node config: {PARTITION} is {partition}, but the config has {len(federation.clients)} clients (0, 1, ...)"
        )
    return federation.clients[partition]


@client_app.query()
def _who(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({PARTITION: _partition(context)})}), reply_to=message)


def _reply(message: Message, partition: int, update: ClientUpdate) -> Message:
    classes = update.classes or {}
    metrics: dict[str, Any] = {
        EXAMPLES: update.examples,
        PARTITION: partition,
        CLASSES: list(classes),
        CLASS_COUNTS: list(classes.values()),
        **{name: float(value) for name, value in update.values.items()},
    }
    return Message(RecordDict({"arrays": to_record(update.state), "metrics": MetricRecord(metrics)}), reply_to=message)


def _partition(context: Context) -> int:
    value = context.node_config.get(PARTITION)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(
            f"node config: {PARTITION} is {value!r}; give the client's number: --node-config 'partition-id=0'"
        )
    return value


@lru_cache(maxsize=2)
def _federation(config: str, data: str) -> Federation:
    made = FederatedConfig.make(json.loads(config))
    return _OwnData(made, data) if data else Federation(made)


@final
class _OwnData(Federation):
    """A federation seen from a node that has data of its own."""

    def __init__(self, config: FederatedConfig, data: str) -> None:
        super().__init__(config)
        self._data = data

    @cached_property
    def train_data(self) -> Split:
        """The node's training set."""
        return load(self._data, split="train", limit=self.config.train_limit)

    @cached_property
    def test_data(self) -> Split:
        """The node's training set: only its shape is asked for."""
        return self.train_data

    def data_of(self, client: str) -> Split:
        """All of it, whoever the node is."""
        return self.train_data
