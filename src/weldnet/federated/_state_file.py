"""A state dict that stays on disk until its tensors are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weldnet.errors import CheckpointError

__all__ = ["StateFile"]


@final
class StateFile(Mapping[str, Tensor]):
    """The tensors of a ``.safetensors`` file, each read when it is asked for and not kept.

    For servers with many clients: give it to :class:`ClientUpdate` as the state, and one client at a time is in memory.

    Args:
        path: the file; it must not change while this is used.

    Raises:
        CheckpointError: it cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from weldnet.checkpoints import save
        >>> path = Path(tempfile.mkdtemp()) / "client.safetensors"
        >>> save({"w": torch.ones(2)}, path)
        >>> StateFile(path)["w"]
        tensor([1., 1.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safe_open(str(path), "pt") as file:
                self._names = tuple(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error}; give a .safetensors file") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(str(self.path), "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(self.path)!r} cannot be read any more: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
