"""What a client keeps from round to round: in Flower's context, and on its disk, where it survives a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from flwr.app import Context, MetricRecord
from torch import Tensor

from weldnet.federated import ClientStore
from weldnet.federated.flower._wire import to_record, to_state

__all__ = ["ClientMemory"]

_ARRAYS, _ROUND = "client-state", "client-round"


@final
class ClientMemory:
    """A client's state of its last round.

    What is asked for is the state that the client had *before* a round: when a server is started again from its last
    checkpoint, clients may have trained in a round that never was.

    Args:
        client: its name.
        context: Flower's, which lives as long as the run and the node.
        folder: on the client's disk; empty to rely on the context.
        run: whose states are kept there, see :attr:`weldnet.federated.Server.run`.
    """

    def __init__(self, client: str, context: Context, folder: str = "", run: str = "") -> None:
        self._client, self._context = client, context
        self._store = ClientStore(folder, run) if folder else None

    def before(self, number: int) -> dict[str, Tensor]:
        """Return the state of the last round before a round; empty if there is none."""
        if self._store is not None:
            return self._store.load(self._client, number)
        record = self._context.state.metric_records.get(_ROUND)
        if record is None or int(str(record["round"])) >= number:
            return {}
        return to_state(self._context.state.array_records[_ARRAYS])

    def keep(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state of a round; nothing is written if there is nothing to keep."""
        if not state:
            return
        if self._store is not None:
            self._store.save(self._client, number, state)
            return
        self._context.state[_ARRAYS] = to_record(state)
        self._context.state[_ROUND] = MetricRecord({"round": number})
