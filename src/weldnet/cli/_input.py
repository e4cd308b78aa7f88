"""From ``--input`` to what the network is called with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldnet.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["check_input", "float_dtype", "make_input"]

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SAVED = (".pt", ".pth", ".bin", ".safetensors")
_FORMS = (
    "give a shape such as 1,3,32,32, 1,16:int64 or '1,16:int64<100' (several with ';' between, by name as in "
    "ids=1,16:int64), or a file with tensors (.pt, .safetensors)"
)
_PART = re.compile(
    r"(?:(?P<name>[^\W\d]\w*)\s*=)?\s*(?P<shape>[^:<=]*?)\s*"
    r"(?::\s*(?P<dtype>\w*)\s*)?(?:(?P<sign>[<=])\s*(?P<number>[^<=]*))?"
)


def make_input(spec: str | None, model: nn.Module, *, seed: int = 0) -> Any:
    """Make the example input that a spec describes.

    Args:
        spec: shapes (``1,3,32,32``; ``1,16:int64``; ``1,16:int64<100``; ``1,16:bool=1``; several with ``;``
            between; for keyword arguments ``ids=1,16:int64``), or a file with a tensor, a tuple of arguments or a dict
            of keyword arguments. None for a network of the transformers library: its own example.
        model: a shape without a dtype takes the model's floating one.
        seed: of the normal values of floating inputs, and of integers below a limit; other integers are zeros.

    Raises:
        UsageError: the spec means nothing.
        CheckpointError: the file cannot be read.
    """
    import torch

    if spec is None:
        return _own_example(model)
    if Path(spec).suffix in _SAVED:
        return _read(Path(spec))
    parts = _parse(spec)
    generator = torch.Generator().manual_seed(seed)
    default = float_dtype(model)
    tensors = [_tensor(part, default, generator) for part in parts]
    if parts[0].name is not None:
        return {part.name: tensor for part, tensor in zip(parts, tensors, strict=True)}
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def check_input(spec: str) -> None:
    """Raise what :func:`make_input` would, as far as it shows without torch and the model."""
    if Path(spec).suffix in _SAVED:
        _require(Path(spec))
    else:
        _parse(spec)


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating parameter: float32 if it has none."""
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _own_example(model: nn.Module) -> Any:
    from weldnet.cli._pretrained import dummy_input

    found = dummy_input(model)
    if found is None:
        raise UsageError(f"{type(model).__name__} brings no example input along: --input SPEC is needed; {_FORMS}")
    return found


@dataclass(frozen=True)
class _Part:
    """One input as its spec says it: a name, a shape, the name of a dtype, and a limit (``<``) or value (``=``)."""

    text: str
    name: str | None
    shape: Sequence[int]
    dtype: str | None
    sign: str | None
    number: int


def _parse(spec: str) -> list[_Part]:
    """Read a spec that names no file; all inputs are named, or none.

    Raises:
        UsageError: it means nothing.
    """
    parts = [_part(text.strip()) for text in spec.split(";") if text.strip()]
    if not parts:
        raise UsageError(f"--input {spec!r} is empty; {_FORMS}")
    names = [part.name for part in parts if part.name is not None]
    if names and len(names) < len(parts):
        raise UsageError(f"--input {spec!r} names {', '.join(names)} and not the rest; name all inputs or none")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--input {spec!r} names {twice} twice; give each input once")
    return parts


def _part(text: str) -> _Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise UsageError(f"--input {text!r} is not a shape; {_FORMS}")
    _check_dtype(match["dtype"])
    shape = _shape(match["shape"], text)
    number = _number(match["number"], text) if match["sign"] else 0
    return _Part(text, match["name"], shape, match["dtype"], match["sign"], number)


def _tensor(part: _Part, default: torch.dtype, generator: torch.Generator) -> Tensor:
    """Make the values of one input."""
    import torch

    dtype = getattr(torch, part.dtype) if part.dtype is not None else default
    shape = list(part.shape)
    if part.sign:
        return _chosen(part.sign, part.number, shape, dtype, part.text, generator)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _shape(text: str, part: str) -> list[int]:
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        raise UsageError(f"--input {part!r} is not a shape; {_FORMS}") from None
    if min(shape) < 1:
        raise UsageError(f"--input {part!r} has a size below 1; {_FORMS}")
    return shape


def _number(text: str, part: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--input {part!r} has {text.strip()!r} for a number; give an integer, as in 1,16:int64<100"
        ) from None


def _chosen(
    sign: str, number: int, shape: list[int], dtype: torch.dtype, part: str, generator: torch.Generator
) -> Tensor:
    """Make random integers below a limit, or one value throughout."""
    import torch

    if sign == "=":
        most = 1 if dtype == torch.bool else None if dtype.is_floating_point else torch.iinfo(dtype).max
        if most is not None and not 0 <= number <= most:
            raise UsageError(
                f"--input {part!r}: {number} is no value from 0 to {most}, which {dtype} holds; choose one"
            )
        return torch.full(shape, number, dtype=dtype)
    if dtype.is_floating_point:
        raise UsageError(f"--input {part!r} has a limit on floating values; limits are for integers: 1,16:int64<100")
    most = 2 if dtype == torch.bool else torch.iinfo(dtype).max
    if not 1 <= number <= most:
        raise UsageError(f"--input {part!r} has the limit {number}; give one from 1 to {most}, which {dtype} holds")
    return torch.randint(number, shape, generator=generator).to(dtype)


def _check_dtype(word: str | None) -> None:
    if word is None or word in _DTYPES:
        return
    close = difflib.get_close_matches(word, _DTYPES, 1) or ["int64"]
    raise UsageError(f"--input: unknown dtype {word!r}; did you mean {close[0]!r}? It may be {', '.join(_DTYPES)}")


def _require(path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise CheckpointError(f"the example input {str(path)!r} does not exist; {_FORMS}") from None
    except OSError as error:
        raise CheckpointError(
            f"the example input {str(path)!r} cannot be read: {error.strerror}; give a file that can be, or a shape"
        ) from error


def _read(path: Path) -> Any:
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    _require(path)
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
            f"the example input {str(path)!r} cannot be read safely ({reason}); save plain tensors with torch.save, "
            "as in torch.save(dict(batch), 'input.pt')"
        ) from error
    leaves = pytree.tree_leaves(loaded)
    if not leaves or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise UsageError(f"the example input {str(path)!r} holds no tensor; save a tensor, a tuple or a dict of them")
    return loaded
