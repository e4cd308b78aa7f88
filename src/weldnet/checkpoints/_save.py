"""Writing state dicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weldnet.checkpoints._paths import SAFETENSORS_SUFFIX, SUFFIXES
from weldnet.checkpoints._text import listing, quote, reason
from weldnet.checkpoints._write import atomic_path, check_suffix, unwritable
from weldnet.errors import CheckpointError


def save(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict, whole or not at all.

    The extension chooses the format: ``.safetensors`` (recommended), or a plain PyTorch state dict for
    ``.pt``, ``.pth`` and ``.bin``. Tensors are written dense, contiguous and without ties: aliases are stored
    as copies.

    Args:
        state: tensors by key, on any device; not changed.
        path: the output; missing folders are made, an existing file is replaced at the very end.
        metadata: text to keep with the weights, such as `provenance`; only ``.safetensors`` has a place for
            it, and there ``format`` is ``pt`` unless given.

    Raises:
        CheckpointError: the path cannot be written, the disk is full, or the state holds something else than
            tensors. The target is then as it was before.
    """
    check_suffix(path, SUFFIXES)
    _check_state(state, metadata, path)
    with atomic_path(path) as temporary:
        try:
            _write(_independent(state), temporary, Path(path).suffix, metadata)
        except KeyError as error:
            raise CheckpointError(f"{quote(path)}: not written: the format has no {error}; use .pt") from error
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(unwritable(path, reason(_origin(error)))) from error


def _check_state(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> None:
    if not state:
        raise CheckpointError(f"{quote(path)}: not written: the state dict is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_meta:
            raise CheckpointError(
                f"{quote(path)}: not written: {listing([str(key)])} is no tensor with data; "
                "give a state dict: tensors by name"
            )
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise CheckpointError(f"{quote(path)}: not written: metadata {str(key)!r} is not text; use str or JSON")


def _write(state: dict[str, Tensor], file: Path, suffix: str, metadata: Mapping[str, str] | None) -> None:
    if suffix == SAFETENSORS_SUFFIX:
        save_file(state, file, metadata={"format": "pt", **(metadata or {})})
        return
    # Through our own stream a full disk is an ordinary error of this process.
    with file.open("wb") as stream:
        torch.save(state, stream)


def _origin(error: BaseException) -> BaseException:
    """Find the OS error behind an error: PyTorch's archive writer covers a full disk with its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return seen or error


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor a storage of its own and of its own size, copying only where needed."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = value.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return result
