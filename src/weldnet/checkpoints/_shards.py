"""Writing a sharded checkpoint tensor by tensor: whole shards or none, and never more than one tensor in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weldnet.checkpoints._stored import DTYPES
from weldnet.checkpoints._write import atomic_path
from weldnet.errors import CheckpointError

__all__ = ["Entry", "plan_shards", "shard_names", "write_index", "write_shard"]

#: Type and shape of a tensor to be written.
Entry = tuple[torch.dtype, tuple[int, ...]]

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def plan_shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Divide tensors among shards in their order; a tensor larger than ``limit`` bytes has a shard to itself."""
    shards: list[list[str]] = []
    room = 0
    for name, entry in entries.items():
        size = _size(entry)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def shard_names(count: int) -> list[str]:
    """Name the files as Hugging Face tools do.

    >>> shard_names(1), shard_names(2)[1]
    (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shard(
    path: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one ``.safetensors`` file, whole or not at all, asking for one tensor after the other.

    Args:
        path: the file.
        entries: type and shape of every tensor.
        read: gives a tensor by its name; called once for each, in order.
        metadata: text to keep with the tensors.

    Raises:
        CheckpointError: the file cannot be written, or the disk is full; nothing is left behind.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, entry in entries.items():
        if entry[0] not in _WORDS:
            raise CheckpointError(f"{str(path)!r}: not written: the format has no {entry[0]} ({name!r}); convert it")
        end = start + _size(entry)
        header[name] = {"dtype": _WORDS[entry[0]], "shape": list(entry[1]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in entries.items():
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            _write_all(stream.write, tensor)


def write_index(folder: Path, shards: Sequence[Sequence[str]], entries: Mapping[str, Entry]) -> None:
    """Write ``model.safetensors.index.json``, which says in which shard every tensor is.

    Raises:
        CheckpointError: it cannot be written.
    """
    names = shard_names(len(shards))
    mapping = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    document = {
        "metadata": {"total_size": sum(map(_size, entries.values()))},
        "weight_map": dict(sorted(mapping.items())),
    }
    with atomic_path(folder / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _size(entry: Entry) -> int:
    return math.prod(entry[1]) * entry[0].itemsize


def _write_all(write: Callable[[memoryview], int | None], tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return
    view = memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    done = 0
    while done < len(view):
        done += write(view[done:]) or 0
