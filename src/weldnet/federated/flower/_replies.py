"""A round's replies, read: updates, errors, and who sent what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

from flwr.app import ArrayRecord, Error, Message, MetricRecord

from weldnet.errors import WeldnetError
from weldnet.federated import ClientUpdate, Dropped
from weldnet.federated.flower._wire import to_state

__all__ = [
    "CLASSES",
    "CLASS_COUNTS",
    "EXAMPLES",
    "PARTITION",
    "Namer",
    "Replies",
    "client_of",
    "error_reply",
    "numbered",
]

EXAMPLES = "num-examples"
PARTITION = "partition-id"
CLASSES = "classes"
CLASS_COUNTS = "class-counts"
_OWN = frozenset({EXAMPLES, PARTITION, CLASSES, CLASS_COUNTS})
_RAISED = 2  # Flower's error code for a client app that raised
_NAMED = re.compile(r"\[(?P<name>[^\]]+)\] (?P<reason>.*)", re.DOTALL)

Namer = Callable[[int], str]
"""From a partition's number to the name of its client."""


def numbered(partition: int) -> str:
    """Return the number as a name."""
    return str(partition)


def error_reply(message: Message, name: str, error: Exception) -> Message:
    """Answer that a client failed; unlike Flower's own error replies this one says which client it was."""
    reason = str(error) if isinstance(error, WeldnetError) else f"{type(error).__name__}: {error}"
    return Message(Error(_RAISED, f"[{name}] {reason}"), reply_to=message)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Replies:
    """What came back.

    Args:
        updates: what can be aggregated, in the order of the clients' names.
        failed: error replies, and replies that are none of ours.
        nodes: the nodes that answered, in whatever way.
        masked: whether a reply belongs to a secure-aggregation protocol.
    """

    updates: tuple[ClientUpdate, ...]
    failed: tuple[Dropped, ...]
    nodes: frozenset[int]
    masked: bool

    @staticmethod
    def read(
        replies: Iterable[Message], names: dict[int, str], arrays: str = "arrays", name: Namer = numbered
    ) -> Replies:
        """Read replies, in whatever order they came.

        Args:
            replies: from Flower.
            names: what each node is called; added to.
            arrays: the name of the record with the weights.
            name: what a partition's client is called.
        """
        updates: list[ClientUpdate] = []
        failed: list[Dropped] = []
        nodes: set[int] = set()
        masked = False
        for reply in replies:
            node = reply.metadata.src_node_id
            nodes.add(node)
            if reply.has_error():
                failed.append(_failure(reply, names))
                continue
            masked |= any(key.startswith("secagg") for key in reply.content)
            names[node] = client_of(reply, name)
            try:
                updates.append(_update(reply, names[node], arrays))
            except (KeyError, TypeError, ValueError) as error:
                failed.append(Dropped(names[node], f"a reply that cannot be read: {type(error).__name__}: {error}"))
        return Replies(
            updates=tuple(sorted(updates, key=lambda update: update.client)),
            failed=tuple(sorted(failed, key=lambda entry: (entry.client, entry.reason))),
            nodes=frozenset(nodes),
            masked=masked,
        )


def client_of(reply: Message, name: Namer = numbered) -> str:
    """Return the name of a reply's client: by its partition, which stays, or else by its node's number."""
    metrics = _metrics(reply)
    partition = None if metrics is None else metrics.get(PARTITION)
    return name(partition) if isinstance(partition, int) else f"node {reply.metadata.src_node_id}"


def _update(reply: Message, client: str, arrays: str) -> ClientUpdate:
    metrics, record = _metrics(reply), reply.content[arrays]
    if metrics is None or EXAMPLES not in metrics:
        raise KeyError(f"no metric {EXAMPLES!r}")
    if not isinstance(record, ArrayRecord):
        raise TypeError(f"{arrays!r} is a {type(record).__name__}")
    classes = None
    if CLASSES in metrics:
        classes = dict(zip(_whole(metrics, CLASSES), _whole(metrics, CLASS_COUNTS), strict=True))
    return ClientUpdate(
        client=client,
        state=to_state(record),
        examples=int(float(metrics[EXAMPLES])),  # pyright: ignore[reportArgumentType]  (a list raises TypeError)
        classes=classes,
        values={k: float(v) for k, v in metrics.items() if k not in _OWN and not isinstance(v, list)},
    )


def _metrics(reply: Message) -> MetricRecord | None:
    return next(iter(reply.content.metric_records.values()), None)


def _whole(metrics: MetricRecord, name: str) -> list[int]:
    values = metrics[name]
    return [int(value) for value in (values if isinstance(values, list) else [values])]


def _failure(reply: Message, names: dict[int, str]) -> Dropped:
    """Read an error reply: who, and why, on one line and without a traceback."""
    node = reply.metadata.src_node_id
    text = (reply.error.reason or f"error {reply.error.code}").strip()
    match = _NAMED.fullmatch(text)
    if match:
        names[node], text = match["name"], match["reason"]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if not line.startswith("Traceback")), "no reason given")
    return Dropped(names.get(node, f"node {node}"), told if len(told) <= 300 else f"{told[:297]}...")
