"""Tensors by name that may lie on disk: those of an alignment of networks larger than memory.

Soft couplings of a wide space take as much room as the weights around it. A shelf writes each large tensor to a file of
its own, and outlives the process by the workspace's list of these files; a spill writes only what memory has no room
for, and ends with the process.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Hashable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from weldnet.checkpoints import StoredState
from weldnet.errors import CheckpointError

__all__ = ["Shelf", "Spill", "write_tensors"]

K = TypeVar("K", bound=Hashable)

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
        self._versions: dict[str, int] = {}
        self._number, self._version = 0, 0
        self._safe: frozenset[str] = frozenset()

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
        self._renew(name)
        if tensor.numel() * tensor.element_size() < _SMALL or not any(tensor.stride()):
            self._small[name] = tensor
            return
        self._number += 1
        file = f"{self._prefix}-{self._number}.safetensors"
        write_tensors({"values": tensor}, self._folder / file)
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

    def version(self, name: str) -> int:
        """Return a number that changes whenever a tensor of this name is put here."""
        return self._versions[name]

    def _renew(self, name: str) -> None:
        self._version += 1
        self._versions[name] = self._version

    def _forget(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None and file not in self._safe:
            (self._folder / file).unlink(missing_ok=True)
        for kept in (self._small, self._recent, self._versions):
            kept.pop(name, None)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._recent[name] = tensor
        while len(self._recent) > 1 and sum(t.nbytes for t in self._recent.values()) > self._limit:
            del self._recent[next(iter(self._recent))]

    # -- what outlives the process ------------------------------------------------------------------

    def guard(self, number: int, files: Collection[str]) -> None:
        """Number files from here on, and let those be that a killed process would go on from."""
        self._number, self._safe = max(number, self._number), frozenset(files)

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
        for name in self:
            self._renew(name)

    @property
    def files(self) -> set[str]:
        """The files in force."""
        return set(self._files.values())


@final
class Spill(MutableMapping[K, Tensor]):
    """Tensors of this process alone: the latest in memory, the others on disk.

    What is taken out and changed in place must be put back.

    Args:
        folder: of its own; what an earlier process left there is removed.
        device: where the tensors are wanted; the CPU if None.
        kept: of all tensors in memory, in bytes; one is always kept.
    """

    def __init__(self, folder: Path, device: torch.device | None = None, kept: int = _KEPT) -> None:
        self._folder, self._device, self._limit = folder, device, kept
        self._files: dict[K, str] = {}
        self._recent: dict[K, Tensor] = {}
        self._written: set[K] = set()
        shutil.rmtree(folder, ignore_errors=True)

    def __getitem__(self, key: K) -> Tensor:
        if key in self._recent:
            self._recent[key] = self._recent.pop(key)  # the latest at the end
            return self._recent[key]
        if key not in self._written:
            raise KeyError(key)
        self._recent[key] = StoredState(self._folder / self._files[key])["values"].to(self._device)
        self._shrink()
        return self._recent[key]

    def __setitem__(self, key: K, tensor: Tensor) -> None:
        self._recent.pop(key, None)
        self._recent[key] = tensor
        self._written.discard(key)
        self._shrink()

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self._recent.pop(key, None)
        self._written.discard(key)

    def __iter__(self) -> Iterator[K]:
        return iter([*self._recent, *(key for key in self._written if key not in self._recent)])

    def __len__(self) -> int:
        return len(self._written | self._recent.keys())

    def clear(self) -> None:
        """Forget everything, without reading it."""
        self._files, self._recent, self._written = {}, {}, set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _shrink(self) -> None:
        while len(self._recent) > 1 and sum(t.nbytes for t in self._recent.values()) > self._limit:
            key = next(iter(self._recent))
            if key not in self._written:
                self._folder.mkdir(exist_ok=True)
                file = self._files.setdefault(key, f"{len(self._files)}.safetensors")
                write_tensors({"values": self._recent[key]}, self._folder / file)
                self._written.add(key)
            del self._recent[key]


def _is_constant(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not any(tensor.stride())


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
    except Exception as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be written: {str(error).splitlines()[0]}; free some space, and start again to go on"
        ) from error
