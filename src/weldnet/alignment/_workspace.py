"""A folder in which an alignment of networks larger than memory keeps its couplings, and from which it goes on.

Soft couplings of a wide space take as much room as the weights around it, so they lie on disk too: a shelf writes each
to a file of its own and keeps only the latest in memory. ``state.json`` says which files are in force; it is replaced
after every sweep, and only then are files of older sweeps removed. What a killed process leaves behind is therefore the
state after a whole sweep, and going on from it gives the same bits as never stopping.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from weldnet.checkpoints import StoredState, atomic_path
from weldnet.errors import CheckpointError

__all__ = ["Shelf", "Workspace"]

#: Tensors below this size stay in memory, and are written together.
_SMALL = 1 << 20
#: What a shelf keeps of the larger ones in memory, in bytes.
_KEPT = 1 << 28


@final
class Shelf(MutableMapping[str, Tensor]):
    """Tensors by name, the large ones on disk.

    What is taken out is not to be changed in place: put the changed tensor back.
    """

    def __init__(self, folder: Path, prefix: str, device: torch.device | None = None, kept: int = _KEPT) -> None:
        self._folder, self._prefix, self._device, self._limit = folder, prefix, device, kept
        self._small: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        self._recent: dict[str, Tensor] = {}
        self._number = 0

    def __getitem__(self, name: str) -> Tensor:
        if name in self._small:
            return self._small[name]
        if name in self._recent:
            self._recent[name] = self._recent.pop(name)  # the latest at the end
            return self._recent[name]
        tensor = StoredState(self._folder / self._files[name])["values"].to(self._device)
        self._keep(name, tensor)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._forget(name)
        if tensor.numel() * tensor.element_size() < _SMALL or not any(tensor.stride()):
            self._small[name] = tensor
            return
        self._number += 1
        file = f"{self._prefix}-{self._number}.safetensors"
        _write({"values": tensor}, self._folder / file)
        self._files[name] = file
        self._keep(name, tensor)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._forget(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._small, *self._files])

    def __len__(self) -> int:
        return len(self._small) + len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._small or name in self._files

    def _forget(self, name: str) -> None:
        for kept in (self._small, self._files, self._recent):
            kept.pop(name, None)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._recent[name] = tensor
        while len(self._recent) > 1 and sum(t.nbytes for t in self._recent.values()) > self._limit:
            del self._recent[next(iter(self._recent))]

    # -- what outlives the process ------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what ``state.json`` is to hold, and the tensors that no file holds yet."""
        constant = {n: [float(t.flatten()[0]), list(t.shape)] for n, t in self._small.items() if _is_constant(t)}
        held = {f"{self._prefix}/{n}": t.contiguous() for n, t in self._small.items() if n not in constant}
        state = {"files": dict(self._files), "constant": constant, "number": self._number}
        return state, held

    def restore(self, state: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`snapshot` gave."""
        self._small, self._files, self._recent = {}, dict(state["files"]), {}
        self._number = int(state["number"])
        for name, (value, shape) in state["constant"].items():
            self._small[name] = torch.full([1] * len(shape), value, device=self._device).expand(shape)
        start = f"{self._prefix}/"
        self._small |= {key.removeprefix(start): t.to(self._device) for key, t in held.items() if key.startswith(start)}

    @property
    def files(self) -> set[str]:
        """The files in force."""
        return set(self._files.values())


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
        self._progress: dict[str, Any] = {}
        self._saved: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "state.json").exists():
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                self._saved = state, dict(StoredState(folder / state["tensors"]))
                self._number = int(state["number"])
            else:
                self._number = 0
        except (OSError, ValueError, KeyError) as error:
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
        _write({**held, **more, **own, "_": torch.zeros(1)}, self.folder / file)
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
        for old in self.folder.glob("*.safetensors"):
            if old.name not in files:
                old.unlink(missing_ok=True)


def _is_constant(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not any(tensor.stride())


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
    except Exception as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be written: {str(error).splitlines()[0]}; free some space, and start again to go on"
        ) from error


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
