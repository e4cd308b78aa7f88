"""From ``--input`` to what the network is called with."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldnet.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["float_dtype", "make_input"]

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SAVED = (".pt", ".pth", ".bin", ".safetensors")
_FORMS = (
    "give a shape such as 1,3,32,32 or 1,16:int64 (several with ';' between), or a saved tensor (.pt, .safetensors)"
)


def make_input(spec: str, model: nn.Module, *, seed: int = 0) -> Any:
    """Make the example input that a spec describes.

    Args:
        spec: shapes (``1,3,32,32``; ``1,16:int64``; several with ``;`` between), or a file with a tensor, a tuple of
            arguments or a dict of keyword arguments.
        model: a shape without a dtype takes the model's floating one.
        seed: of the normal values of floating inputs; integer ones are zeros.

    Raises:
        UsageError: the spec means nothing.
        CheckpointError: the file cannot be read.
    """
    import torch

    if Path(spec).suffix in _SAVED:
        return _read(Path(spec))
    generator = torch.Generator().manual_seed(seed)
    default = float_dtype(model)
    tensors = tuple(_tensor(part.strip(), default, generator) for part in spec.split(";") if part.strip())
    if not tensors:
        raise UsageError(f"--input {spec!r} is empty; {_FORMS}")
    return tensors[0] if len(tensors) == 1 else tensors


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating parameter: float32 if it has none."""
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _tensor(part: str, default: torch.dtype, generator: torch.Generator) -> Tensor:
    import torch

    sizes, colon, word = part.partition(":")
    dtype = _dtype(word.strip()) if colon else default
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise UsageError(f"--input {part!r} is not a shape; {_FORMS}") from None
    if min(shape) < 1:
        raise UsageError(f"--input {part!r} has a size below 1; {_FORMS}")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _dtype(word: str) -> torch.dtype:
    import torch

    if word in _DTYPES:
        return getattr(torch, word)
    close = difflib.get_close_matches(word, _DTYPES, 1) or ["int64"]
    raise UsageError(f"--input: unknown dtype {word!r}; did you mean {close[0]!r}? It may be {', '.join(_DTYPES)}")


def _read(path: Path) -> Any:
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    if not path.is_file():
        raise CheckpointError(f"the example input {str(path)!r} does not exist; {_FORMS}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
            loaded = next(iter(loaded.values())) if len(loaded) == 1 else loaded
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"the example input {str(path)!r} cannot be read safely ({reason}); save plain tensors with torch.save"
        ) from error
    leaves = pytree.tree_leaves(loaded)
    if not leaves or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise UsageError(f"the example input {str(path)!r} holds no tensor; save a tensor, a tuple or a dict of them")
    return loaded
