"""What clients keep between rounds, on disk, so that a restart loses nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import Tensor

from weldnet.checkpoints import load, read_metadata, save
from weldnet.errors import CheckpointError

__all__ = ["ClientStore"]

_RUN = "run"


@final
class ClientStore:
    """Client states by client and round: ``<folder>/<client>/round-000003.safetensors``.

    A round that is done again after an interruption must find the state that it found first; so the state of the round
    before stays until the one after. What another run has left in the folder is not found, and makes room for this one.

    Args:
        folder: where to keep them; made when something is kept.
        run: whose states they are, see :attr:`Server.run`.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str = "") -> None:
        self._folder, self._run = Path(folder), run

    def load(self, client: str, before: int) -> dict[str, Tensor]:
        """Return what a client kept in its last round before the given one; empty if there is nothing."""
        known = [path for number, path in self._rounds(client) if number < before]
        return load(known[-1]) if known else {}

    def save(self, client: str, round: int, state: Mapping[str, Tensor]) -> None:
        """Keep a client's state of a round, atomically, and forget all but the one before.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not state:
            return
        save(state, self._folder / client / f"round-{round:06d}.safetensors", metadata={_RUN: self._run})
        rounds = self._rounds(client)
        gone = [path for number, path in rounds if number <= round][:-2]
        foreign = set((self._folder / client).glob("round-*.safetensors")) - {path for _, path in rounds}
        for path in (*gone, *foreign):
            path.unlink(missing_ok=True)

    def _rounds(self, client: str) -> list[tuple[int, Path]]:
        """This run's rounds, the oldest first."""
        paths = sorted((self._folder / client).glob("round-*.safetensors"))
        return [(int(path.stem.removeprefix("round-")), path) for path in paths if self._owns(path)]

    def _owns(self, path: Path) -> bool:
        """Whether this run wrote a file; one that cannot be read is nobody's."""
        try:
            return read_metadata(path).get(_RUN, "") == self._run
        except CheckpointError:
            return False
