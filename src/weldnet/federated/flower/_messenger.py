"""The server's post: which nodes there are, what they are called, and the messages of a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from weldnet.errors import FederatedError, UsageError
from weldnet.federated.flower._replies import Namer, Replies, client_of, numbered

__all__ = ["Messenger"]

_LOG = logging.getLogger("weldnet.federated")


@final
class Messenger:
    """Writes nodes by their clients' names, and reads what they answer.

    Args:
        nodes: how many to wait for before a round.
        least: how many must be there for a round to begin.
        patience: seconds to wait for ``nodes`` nodes; then those that are there will do.
        name: what a partition's client is called.
    """

    def __init__(self, nodes: int, least: int = 1, patience: float = 600.0, name: Namer = numbered) -> None:
        if not 1 <= least <= nodes:
            raise UsageError(
                f"{least} replies are needed, but {nodes} nodes expected; give 1 or more, and enough nodes"
            )
        self._nodes, self._least, self._patience, self._name = nodes, least, patience, name
        self._names: dict[int, str] = {}
        self._asked: list[int] = []

    def wait(self, grid: Grid) -> list[int]:
        """Wait for the nodes; return those that are there, sorted.

        Raises:
            FederatedError: too few came.
        """
        end, said = time.monotonic() + self._patience, -1
        while len(nodes := sorted(grid.get_node_ids())) < self._nodes and time.monotonic() < end:
            if len(nodes) != said:
                said = len(nodes)
                _LOG.info("%d of %d nodes are there", said, self._nodes)
            time.sleep(min(1.0, self._patience))
        if len(nodes) < self._least:
            raise FederatedError(
                f"{len(nodes)} of {self._nodes} nodes came within {self._patience:g} s and a round needs "
                f"{self._least}; start more nodes, or lower min_replies"
            )
        if len(nodes) < self._nodes:
            # Who did not come in all this time is not waited for again.
            self._nodes = len(nodes)
        return nodes

    def named(self, nodes: Sequence[int], grid: Grid) -> dict[int, str]:
        """Ask the nodes that are not known yet who they are; return the names of all."""
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes if node not in self._names]
        for reply in grid.send_and_receive(questions, timeout=self._patience) if questions else ():
            if not reply.has_error():
                self._names[reply.metadata.src_node_id] = client_of(reply, self._name)
        return {node: self.name_of(node) for node in nodes}

    def messages(
        self, contents: Mapping[int, tuple[ArrayRecord, Mapping[str, Any]]], number: int, keys: tuple[str, str]
    ) -> list[Message]:
        """Write a round's messages, each with records of its own: no mod can change what another client reads.

        Args:
            contents: for each node its weights, and what is said with them.
            number: of the round.
            keys: the names of the two records.
        """
        self._asked = list(contents)
        return [
            Message(
                RecordDict({keys[0]: arrays, keys[1]: ConfigRecord({**config, "server-round": number})}),
                node,
                MessageType.TRAIN,
                group_id=str(number),
            )
            for node, (arrays, config) in contents.items()
        ]

    def read(self, replies: Iterable[Message], arrays: str = "arrays") -> Replies:
        """Read the replies to the last messages."""
        return Replies.read(replies, self._names, arrays, self._name)

    def silent(self, replies: Replies) -> tuple[str, ...]:
        """Return who was asked and did not answer, sorted."""
        return tuple(sorted(self.name_of(node) for node in self._asked if node not in replies.nodes))

    def name_of(self, node: int) -> str:
        """Return what a node is called: its client's name once that is known."""
        return self._names.get(node, f"node {node}")
