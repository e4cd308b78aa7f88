"""From what the user named (a file, an index, a folder) to the files that hold the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, final

from weldnet.checkpoints._text import listing, quote, reason
from weldnet.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
SUFFIXES = (SAFETENSORS_SUFFIX, ".pt", ".pth", ".bin")
"""The extensions that `save` writes; `load` reads ``.ckpt`` and ``.index.json`` too."""

# The names that Hugging Face tools write, best first; a folder may hold the same weights under several.
_KNOWN_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_READABLE = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES, INDEX_SUFFIX)
_EXTENSIONS = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))


@final
@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes:
        path: the checkpoint file, or the index file of a sharded checkpoint.
        shards: the files that hold tensors, in name order, each with the keys that the index
            expects there (None for an unsharded file: all of them).
    """

    path: Path
    shards: Mapping[Path, tuple[str, ...] | None]


def locate(path: str | os.PathLike[str]) -> Source:
    """Find the files behind a path.

    Raises:
        CheckpointError: nothing readable is there, or an index names a file that is missing
            or outside its folder.
    """
    file = _pick(Path(path))
    if not file.name.endswith(INDEX_SUFFIX):
        _check_suffix(file)
        _check_content(file)
        return Source(file, {file: None})
    _check_content(file)
    return Source(file, _read_index(file))


def _pick(path: Path) -> Path:
    try:
        if path.is_dir():
            return _pick_in_folder(path)
        if path.is_file():
            return path
        found = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{quote(path)}: cannot be read: {reason(error)}") from error
    if found:
        raise CheckpointError(f"{quote(path)}: is not a regular file; name a checkpoint file or its folder")
    raise CheckpointError(f"{quote(path)}: no such file; check the path")


def _pick_in_folder(folder: Path) -> Path:
    names = sorted(p.name for p in folder.iterdir() if _is_checkpoint(p))
    if {"model.safetensors", "model.safetensors.index.json"} <= set(names):
        raise CheckpointError(
            f"{quote(folder)}: holds both model.safetensors and a sharded index; name one by its path"
        )
    known = [name for name in _KNOWN_NAMES if name in names]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    for candidates in (known[:1], indices, names):
        if len(candidates) == 1:
            return folder / candidates[0]
    if not names:
        raise CheckpointError(f"{quote(folder)}: the folder holds no checkpoint ({_EXTENSIONS} or an index)")
    raise CheckpointError(
        f"{quote(folder)}: the folder holds {len(names)} checkpoints ({listing(names)}); name one by its path"
    )


def _is_checkpoint(path: Path) -> bool:
    return path.name.endswith(_READABLE) and not path.name.startswith(".") and path.is_file()


def _check_suffix(file: Path) -> None:
    if file.suffix not in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES):
        raise CheckpointError(
            f"{quote(file)}: unknown extension {file.suffix!r}; expected {_EXTENSIONS} or an {INDEX_SUFFIX} file"
        )


def _check_content(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{quote(file)}: cannot be read: {reason(error)}") from error
    if not head:
        raise CheckpointError(f"{quote(file)}: the file is empty; copy or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{quote(file)}: is a Git LFS pointer, not the weights; run `git lfs pull`")


def _read_index(index: Path) -> dict[Path, tuple[str, ...] | None]:
    shards: dict[str, list[str]] = {}
    for key, name in _weight_map(index).items():
        shards.setdefault(name, []).append(key)
    return {_shard(index, name): tuple(shards[name]) for name in sorted(shards)}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{quote(index)}: the index is not valid JSON: {reason(error)}") from error
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"{quote(index)}: the index needs a 'weight_map' from tensor names to file names")
    return mapping


def _shard(index: Path, name: str) -> Path:
    # Windows rules know both separators and drives. Links are not resolved: caches link shards elsewhere.
    pure = PureWindowsPath(name)
    if pure.anchor or ".." in pure.parts or not pure.parts:
        raise CheckpointError(f"{quote(index)}: the index names {name!r}, which is outside its folder")
    shard = index.parent / name
    if shard.is_dir() or name.endswith(INDEX_SUFFIX):
        raise CheckpointError(f"{quote(index)}: the index names {name!r}, which is not a checkpoint file")
    if not shard.is_file():
        raise CheckpointError(f"{quote(index)}: the index names {name!r}, which is missing; copy it there")
    _check_suffix(shard)
    _check_content(shard)
    return shard
