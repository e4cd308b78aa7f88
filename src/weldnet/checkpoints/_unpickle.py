"""Reading the PyTorch formats: pickles, of which only tensors and plain containers are let in."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weldnet.checkpoints._text import listing, quote, reason
from weldnet.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ZIP_MAGIC = b"PK\x03\x04"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|unsupported class ([\w.]+)|unrecognized function ([\w.]+)")
# Modules whose names stand in every plain state dict; the rest is what the loader may have refused.
_PLAIN_MODULES = frozenset({"torch", "torch._utils", "torch.storage", "torch._tensor", "collections", "_codecs"})
# A file of the old format is a few pickles in a row, then raw storage.
_PICKLES_PER_FILE = 5


def read_torch(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Read a PyTorch file and find the state dict in it.

    Raises:
        CheckpointError: the file is damaged, would run code, or holds no state dict.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Only the zip format can be mapped; the format before PyTorch 1.6 is read into memory.
            content = torch.load(file, map_location=device, weights_only=True, mmap=_is_zip(file))
    except MemoryError:
        raise
    # Whatever a damaged file makes the reader raise, the file is what is wrong.
    except Exception as error:
        raise CheckpointError(f"{quote(file)}: {_explain(file, error)}") from error
    return {key: tensor.detach() for key, tensor in _unwrap(content, file).items()}


def _unwrap(content: object, file: Path) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{quote(file)}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    wrappers = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
    full = [name for name in wrappers if _is_state(content[name])]
    if len(full) > 1:
        raise CheckpointError(f"{quote(file)}: holds several state dicts ({listing(full)}); save the one you mean")
    if full:
        return content[full[0]]
    where, state = (f"{wrappers[0]!r} holds", content[wrappers[0]]) if wrappers else ("holds", content)
    return _check_tensors(state, where, file)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return len(content) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _check_tensors(state: Mapping[Any, Any], where: str, file: Path) -> Mapping[str, Tensor]:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{quote(file)}: {where} {listing([str(key)])} of type {type(value).__name__}, "
                "where a state dict has tensors by name; save model.state_dict()"
            )
    return state


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _explain(file: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return "is a TorchScript archive; load it with torch.jit.load and save its state_dict()"
    match = _REFUSED.search(str(error))
    names = [name for name in _globals(file) if name.rpartition(".")[0] not in _PLAIN_MODULES]
    refused = next(filter(None, match.groups())) if match else next(iter(names), None)
    if any(name.startswith("torch.nn.modules.") for name in names):
        return f"is a whole pickled module ({refused}), which would run code when read; save model.state_dict()"
    if refused is not None:
        return (
            f"would have to run code when read ({refused}), which is refused; "
            "if you trust it, load it yourself and save its state dict as .safetensors"
        )
    return f"damaged, cut short or not a PyTorch file ({_short(error)}); copy or save it again"


def _short(error: Exception) -> str:
    # The rest of what PyTorch says is mostly advice on how to load the file unsafely.
    archive = isinstance(error, RuntimeError | OSError)
    return reason(error).partition(". ")[0] if archive else "its pickle is broken"


def _globals(file: Path) -> list[str]:
    """List the names that a pickle would import, by reading its opcodes and running none."""
    found: list[str] = []
    try:
        for stream in _pickles(file):
            for _ in range(_PICKLES_PER_FILE):
                found.extend(_imports(stream))
    # The file is known to be broken or hostile; what was found until here is enough.
    except Exception:
        return found
    return found


def _pickles(file: Path) -> Iterator[BinaryIO]:
    if not _is_zip(file):
        with file.open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as stream:
                    yield stream  # pyright: ignore[reportReturnType]


def _imports(stream: BinaryIO) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
