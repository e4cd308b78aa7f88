"""A grid in one process: Flower's public interface, straight around a client app."""

from __future__ import annotations

import contextlib
import copy
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["LocalGrid"]

_RAISED = 2
"""Flower's error code for a client app that raised."""

_SERVER = 1
"""Flower's number for the server's node."""

Client = Callable[[Message, Context], Message]


@final
class LocalGrid(Grid):
    """Runs a client app's clients one after the other, in the order of their numbers.

    What the server and a client exchange is what Flower would carry: a copy of the message, arrays packed to bytes. A
    client that raises becomes an error reply, and one that does not answer in time is left alone, its reply missing,
    as in a deployment.

    Args:
        app: a ClientApp, or anything called as one.
        contexts: each client's context by its node's number; their state is kept from message to message.
    """

    def __init__(self, app: Client, contexts: Mapping[int, Context]) -> None:
        self._app, self._contexts = app, dict(contexts)
        self._waiting: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._run: Any = None
        self._count = 0
        _introduce(run_id=next(iter(self._contexts.values())).run_id if self._contexts else 0)

    def set_run(self, run: Any) -> None:
        """Keep Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run, if it was set."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; deprecated by Flower, whose ``Message`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the clients' numbers."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; a client begins with its one when the reply is asked for."""
        names: list[str] = []
        for message in messages:
            self._count += 1
            names.append(f"message-{self._count}")
            self._waiting[names[-1]] = message
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to some messages, however long they take."""
        return self._pull(message_ids, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, and return the replies of the clients that took no longer than ``timeout`` seconds each.

        In a deployment clients work side by side and have all the time each; here they work one after the other.
        """
        return self._pull(self.push_messages(messages), timeout)

    def _pull(self, names: Iterable[str], timeout: float | None) -> list[Message]:
        names = list(names)
        for name in sorted(names, key=lambda name: self._node(name)):
            if name in self._waiting:
                reply = self._answer(self._waiting.pop(name), timeout)
                if reply is not None:
                    self._replies[name] = reply
        return [self._replies.pop(name) for name in names if name in self._replies]

    def _node(self, name: str) -> int:
        return self._waiting[name].metadata.dst_node_id if name in self._waiting else -1

    def _answer(self, message: Message, timeout: float | None) -> Message | None:
        """Let a client answer; None if it takes too long."""
        found: list[Message] = []

        def work() -> None:
            found.append(_ask(self._app, message, self._contexts[message.metadata.dst_node_id]))

        if timeout is None:
            work()
            return found[0]
        # Python cannot stop a thread: one that never answers goes on until the program ends.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(timeout)
        return found[0] if found else None


def _ask(app: Client, message: Message, context: Context) -> Message:
    own = Message(copy.deepcopy(message.content), message.metadata.dst_node_id, message.metadata.message_type)
    own.metadata.group_id = message.metadata.group_id
    try:
        return app(own, context)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        return Message(Error(_RAISED, reason), reply_to=own)


def _introduce(run_id: int) -> None:
    """Tell Flower which run and node this process is; its messages ask for that since 1.40."""
    with contextlib.suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, _SERVER
