"""State dicts that stay on disk: headers are read at once, tensors when they are asked for."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weldnet.checkpoints._match import match_model, tied_keys, whole_kinds
from weldnet.checkpoints._paths import SAFETENSORS_SUFFIX, locate
from weldnet.checkpoints._prefix import match_prefix
from weldnet.checkpoints._text import listing, quote, reason
from weldnet.errors import CheckpointError

__all__ = ["DTYPES", "StoredState", "Where"]

#: The words of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


@final
@dataclass(frozen=True)
class Where:
    """Where a tensor lies: its file, first byte there, type and shape; and its type there, if it is read as another."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@final
class StoredState(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read anew whenever it is asked for.

    They are read by plain reads and not through a memory map, whose pages would stay this process's memory; what is
    read is a tensor of its own, and nothing is kept.

    Args:
        path: as for :func:`weldnet.load`: a ``.safetensors`` file, an ``.index.json``, or a folder with one of them.

    Raises:
        CheckpointError: a file is missing, damaged or of another format, or a tensor has a type without a name here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = locate(path)
        self.path = source.path
        self.where: dict[str, Where] = {}
        for shard, keys in source.shards.items():
            if shard.suffix != SAFETENSORS_SUFFIX:
                raise CheckpointError(
                    f"{quote(shard)}: only safetensors can be read tensor by tensor; save the network as .safetensors"
                )
            found = _read_header(shard)
            missing = [key for key in keys or () if key not in found]
            if missing:
                raise CheckpointError(
                    f"{quote(shard)}: lacks the tensor {listing(missing)} that {quote(source.path.name)} places there; "
                    "the shards and the index are not of the same save"
                )
            self.where |= found if keys is None else {key: found[key] for key in keys}
        if not self.where:
            raise CheckpointError(f"{quote(source.path)}: holds no tensors")
        self.files = tuple(source.shards)
        self.stored: Mapping[str, Where] = self.where

    def __getitem__(self, key: str) -> Tensor:
        return read_tensor(self.where[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def __contains__(self, key: object) -> bool:
        return key in self.where

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors take."""
        return sum(where.nbytes for where in self.stored.values())

    def size_of(self, key: str) -> int:
        """Return how many bytes one tensor takes."""
        return self.where[key].nbytes

    def matched(self, model: nn.Module, name: str) -> StoredState:
        """Return the same tensors by the names that a model gives them, tied ones under each of their names.

        ``stored`` has each tensor once, in the order of the files.

        Args:
            model: its parameters may be on the meta device.
            name: of the network, for messages.

        Raises:
            CheckpointError: keys, shapes or kinds are not the model's, or tied tensors differ.
        """
        found, stripped, added = match_prefix(self.weightless(), model)
        where = {f"{added}{key.removeprefix(stripped)}": place for key, place in self.where.items()}
        groups = tied_keys(model)
        for key in [key for key in where if key in groups]:
            first = next(other for other in groups[key] if other in where)
            if key != first:
                if not torch.equal(read_tensor(where[key]), read_tensor(where[first])):
                    raise CheckpointError(
                        f"{name!r}: {listing([first, key])} differ, but are one tensor in the model; "
                        "use a model that does not tie them"
                    )
                del where[key], found[key]
        # Whole numbers in a floating tensor become the model's integers; nearly always counters, so they are small.
        kinds = whole_kinds(found, model)
        match_model(found | {key: read_tensor(where[key]) for key in kinds}, model, name)
        where |= {key: replace(where[key], dtype=kind, stored=where[key].dtype) for key, kind in kinds.items()}
        whole = {key: next(where[other] for other in group if other in where) for key, group in groups.items()}
        state = copy.copy(self)
        state.where, state.stored = whole, where
        return state

    def weightless(self) -> dict[str, Tensor]:
        """Return tensors of the same types and shapes on the meta device."""
        return {key: torch.empty(w.shape, dtype=w.dtype, device="meta") for key, w in self.where.items()}


def read_tensor(where: Where) -> Tensor:
    """Read one tensor into memory of its own.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter.
    """
    tensor = torch.empty(where.shape, dtype=where.stored or where.dtype)
    if not where.nbytes:
        return tensor.to(where.dtype)
    view: memoryview = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    try:
        with where.file.open("rb", buffering=0) as stream:
            stream.seek(where.start)
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{quote(where.file)}: has become shorter while it was read; start again")
                done += got
    except OSError as error:
        raise CheckpointError(f"{quote(where.file)}: cannot be read: {reason(error)}") from error
    return tensor.to(where.dtype)


def _read_header(file: Path) -> dict[str, Where]:
    try:
        with safe_open(str(file), framework="np"):
            pass  # checks the header, and that the file is as long as it says
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except Exception as error:
        why = reason(error)
        raise CheckpointError(
            f"{quote(file)}: damaged, cut short or not a safetensors file ({why}); copy or save it again"
        ) from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{quote(file)}: {listing([key])} is of the type {entry['dtype']}, which weldnet does not know; "
                f"convert it to one of {', '.join(DTYPES)}"
            )
    # In the order of the bytes, which a writer chose and reading in a row is fastest.
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    return {
        key: Where(file, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for key, entry in ordered
    }
