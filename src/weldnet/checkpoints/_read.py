"""Reading: tensors, metadata, fingerprints."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from weldnet._arrays import find_device
from weldnet.checkpoints._paths import SAFETENSORS_SUFFIX, locate
from weldnet.checkpoints._text import listing, plural, quote, reason
from weldnet.checkpoints._unpickle import read_torch
from weldnet.errors import CheckpointError

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_CHUNK = 1 << 20


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a state dict from a checkpoint, never running code from it.

    Reads ``.safetensors``, the PyTorch formats ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` (memory-mapped where
    the file allows), a sharded checkpoint by its ``.index.json``, or a folder that holds one of these. A
    training checkpoint ``{"state_dict": ...}``, ``{"model_state_dict": ...}`` or ``{"model": ...}`` is
    unwrapped. The prefixes ``module.`` and ``_orig_mod.``, left by data-parallel and compiled models, are
    dropped where every key has them.

    Args:
        path: the file, index file or folder.
        device: where to put the tensors.

    Returns:
        Tensors by name, with the dtypes of the file and without gradients. Tensors that are tied in a PyTorch
        file stay tied.

    Raises:
        CheckpointError: the file is missing, damaged, would run code, or is no state dict.
        UsageError: there is no such device.
    """
    target = find_device(device) or torch.device("cpu")
    source = locate(path)
    state: dict[str, Tensor] = {}
    for shard, keys in source.shards.items():
        tensors = _read_file(shard, target)
        state.update(tensors if keys is None else _select(tensors, keys, shard, source.path))
    if not state:
        raise CheckpointError(f"{quote(source.path)}: holds no tensors")
    for key, tensor in state.items():
        _check_dense(key, tensor, source.path)
    return _strip_prefixes(state)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the text metadata of a ``.safetensors`` file, such as `provenance`.

    Args:
        path: as for `load`. The metadata of several shards are merged in name order.

    Returns:
        The metadata; empty if there are none, and for PyTorch files, which have no place for them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    metadata: dict[str, str] = {}
    for shard in locate(path).shards:
        if shard.suffix == SAFETENSORS_SUFFIX:
            metadata.update(_read_header(shard))
    return metadata


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Fingerprint a checkpoint, in constant memory.

    Args:
        path: as for `load`.

    Returns:
        The SHA-256 in hexadecimal; for a sharded checkpoint that of its shards, end to end in name order.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for shard in locate(path).shards:
        try:
            with shard.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{quote(shard)}: cannot be read: {reason(error)}") from error
    return digest.hexdigest()


def _read_file(file: Path, device: torch.device) -> dict[str, Tensor]:
    return _read_safetensors(file, device) if file.suffix == SAFETENSORS_SUFFIX else read_torch(file, device)


def _read_safetensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    # Whatever a damaged file makes the reader raise, the file is what is wrong.
    try:
        with safe_open(str(file), framework="pt", device=str(device)) as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - the handle is no dict
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(_damaged(file, error)) from error


def _read_header(file: Path) -> dict[str, str]:
    try:
        with safe_open(str(file), framework="pt") as stream:
            return dict(stream.metadata() or {})
    except Exception as error:
        raise CheckpointError(_damaged(file, error)) from error


def _damaged(file: Path, error: Exception) -> str:
    why = reason(error)
    return f"{quote(file)}: damaged, cut short or not a safetensors file ({why}); copy or save it again"


def _select(tensors: dict[str, Tensor], keys: tuple[str, ...], shard: Path, index: Path) -> dict[str, Tensor]:
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{quote(shard)}: lacks {plural(len(missing), 'tensor')} that {quote(index.name)} places there: "
            f"{listing(missing)}; the shards and the index are not of the same save"
        )
    return {key: tensors[key] for key in keys}


def _check_dense(key: str, tensor: Tensor, file: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise CheckpointError(
            f"{quote(file)}: tensor {listing([key])} is sparse, quantized or without data; save it as a dense tensor"
        )


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) and key != prefix for key in state):
            return _strip_prefixes({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state
