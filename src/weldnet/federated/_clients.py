"""What clients keep between rounds, on disk, so that a restart loses nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import Tensor

from weldnet.checkpoints import load, save

__all__ = ["ClientStore"]


@final
class ClientStore:
    """Client states by client and round: ``<folder>/<client>/round-000003.safetensors``.

    A round that is done again after an interruption must find the state that it found first; so the state of the round
    before stays until the one after.

    Args:
        folder: where to keep them; made when something is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

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
        save(state, self._folder / client / f"round-{round:06d}.safetensors")
        for _, path in [entry for entry in self._rounds(client) if entry[0] <= round][:-2]:
            path.unlink(missing_ok=True)

    def _rounds(self, client: str) -> list[tuple[int, Path]]:
        paths = sorted((self._folder / client).glob("round-*.safetensors"))
        return [(int(path.stem.removeprefix("round-")), path) for path in paths]
