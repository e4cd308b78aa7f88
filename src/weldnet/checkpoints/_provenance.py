"""Where a fused checkpoint comes from, as text that a safetensors file can carry."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weldnet._version import __version__
from weldnet.checkpoints._read import file_sha256
from weldnet.checkpoints._text import reason
from weldnet.errors import UsageError


def provenance(parents: Sequence[str | os.PathLike[str]], config: Mapping[str, Any], seed: int) -> dict[str, str]:
    """Describe how a checkpoint was made, well enough to make it again.

    Args:
        parents: the checkpoints it was made from; only their names, not their folders, are kept.
        config: the resolved settings: JSON values and paths.
        seed: the seed of the run.

    Returns:
        ``weldnet_version``, ``torch_version``, ``python_version``, ``parents`` (a JSON list of
        ``{"file", "sha256"}``), ``config`` (JSON with sorted keys), ``seed`` and ``format`` (``pt``).

    Raises:
        CheckpointError: a parent cannot be read.
        UsageError: the config holds something that JSON has no word for.
    """
    files = [{"file": Path(os.path.abspath(path)).name, "sha256": file_sha256(path)} for path in parents]
    return {
        "format": "pt",
        "weldnet_version": __version__,
        "torch_version": str(torch.__version__),
        "python_version": platform.python_version(),
        "parents": _canonical(files),
        "config": _canonical(config),
        "seed": str(seed),
    }


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the tensors of a state dict: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _canonical(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_json)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config cannot be kept with the weights: {reason(error)}; use JSON values") from error


def _as_json(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
