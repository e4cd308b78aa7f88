"""A folder in which an alignment of networks larger than memory keeps its couplings, and from which it goes on.

Couplings lie on shelves, the large ones as files. ``state.json`` says which files are in force; it is replaced
after every sweep, and only then are files of older sweeps removed. What a killed process leaves behind is therefore the
state after a whole sweep, and going on from it gives the same bits as never stopping.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from weldnet.alignment._shelf import Shelf, Spill, write_tensors
from weldnet.checkpoints import StoredState, atomic_path
from weldnet.errors import CheckpointError

__all__ = ["Workspace"]


@final
class Workspace:
    """Couplings and progress of one alignment, in a folder of its own.

    Args:
        folder: made if it is not there; what is in it is taken up.
        device: where the couplings are wanted; the CPU if None.
        begin: is told what begins, and how many bytes of weights it will read.
        read: is told how many bytes of weights were read.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device | None = None,
        begin: Callable[[str, int], None] = lambda what, size: None,
        read: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.folder, self._device, self.begin, self.read = folder, device, begin, read
        self.couplings, self.inner = Shelf(folder, "whole", device), Shelf(folder, "inside", device)
        self.sums: Spill[Any] = Spill(folder / "sums", device)
        self._progress: dict[str, Any] = {}
        self._saved: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "state.json").exists():
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                self._saved = state, dict(StoredState(folder / state["tensors"]))
                self._number = int(state["number"])
                for shelf, key in ((self.couplings, "whole"), (self.inner, "inside")):
                    shelf.guard(int(state[key]["number"]), _present(folder, state[key]["files"].values()))
            else:
                self._number = 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise CheckpointError(
                f"{str(folder)!r}: the unfinished alignment cannot be read ({error}); remove the folder to begin anew"
            ) from error

    def resume(self, stage: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Take up the couplings that were kept after the last sweep of a stage.

        Returns:
            What :meth:`keep` was given; None if nothing was kept, or that of another stage.
        """
        if self._saved is None or self._saved[0]["stage"] != stage:
            return None
        state, held = self._saved
        for shelf, key in ((self.couplings, "whole"), (self.inner, "inside")):
            shelf.restore(state[key], held)
        self._progress = dict(state["progress"])
        return self._progress, {
            k.removeprefix("own/"): t.to(self._device) for k, t in held.items() if k.startswith("own/")
        }

    def keep(self, stage: str, progress: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep the couplings as they are now, and how far a stage is; what was said before is kept too.

        Raises:
            CheckpointError: the folder cannot be written; what was kept before still holds.
        """
        whole, held = self.couplings.snapshot()
        inside, more = self.inner.snapshot()
        own = {f"own/{key}": tensor.contiguous() for key, tensor in (tensors or {}).items()}
        self._progress = {**self._progress, **progress}
        self._number += 1
        file = f"state-{self._number}.safetensors"
        write_tensors({**held, **more, **own, "_": torch.zeros(1)}, self.folder / file)
        files = {file, *self.couplings.files, *self.inner.files}
        for name in files:
            _sync(self.folder / name)
        state = {
            "stage": stage,
            "progress": self._progress,
            "tensors": file,
            "number": self._number,
            "whole": whole,
            "inside": inside,
        }
        with atomic_path(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")
        self._saved = None
        for shelf in (self.couplings, self.inner):
            shelf.guard(0, shelf.files)
        for old in self.folder.glob("*.safetensors"):
            if old.name not in files:
                old.unlink(missing_ok=True)


def _present(folder: Path, files: Collection[str]) -> Collection[str]:
    lost = [file for file in files if not (folder / file).is_file()]
    if lost:
        raise FileNotFoundError(f"{lost[0]} is missing")
    return files


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
