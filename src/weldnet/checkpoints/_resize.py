"""Models of other widths: a copy whose tensors have other shapes, and files that hold one."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree

from weldnet._modules import evaluation_mode, forget_cached
from weldnet.checkpoints._match import load_into
from weldnet.checkpoints._prefix import match_prefix
from weldnet.checkpoints._read import load, read_metadata
from weldnet.errors import CheckpointError, ModelError

__all__ = ["WIDTHS", "load_model", "read_widths", "resized"]

#: The metadata key under which a widened network's file says how many units each space has, as JSON.
WIDTHS = "widths"


def resized(model: nn.Module, shapes: Mapping[str, Tensor | Sequence[int]], example_input: Any = None) -> nn.Module:
    """Copy a model and give its tensors other shapes, and its modules the sizes that go with them.

    Tensors that change their shape are zeros: load a state dict into the copy. The attributes of linear layers,
    convolutions, norms and embeddings (``in_features``, ``out_channels``, ``normalized_shape``, ...) are kept true, so
    that the copy prints, runs and trains as if it had been built that wide.

    Args:
        model: not changed.
        shapes: by state dict key, a shape or a tensor that has it; tensors left out keep theirs.
        example_input: what the model takes (a tensor, a tuple of arguments or a dict of keyword arguments), to try the
            copy on: it must answer in the shapes of the model. Not tried if None.

    Raises:
        CheckpointError: the model has no such tensor.
        ModelError: a module has sizes that weldnet does not know, or the forward pass does not run at other widths.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> resized(net, {"0.weight": (10, 4), "0.bias": (10,), "1.weight": (3, 10)}, torch.zeros(1, 4))[0]
        Linear(in_features=4, out_features=10, bias=True)
    """
    wanted = {key: torch.Size(s.shape if isinstance(s, Tensor) else s) for key, s in shapes.items()}
    have = model.state_dict(keep_vars=True)
    unknown = [key for key in wanted if not isinstance(have.get(key), Tensor)]
    if unknown:
        raise CheckpointError(f"{type(model).__name__} has no tensor {unknown[0]!r}; give a state of this model")
    other = copy.deepcopy(model)
    changed = _replace_tensors(other, wanted)
    for path, module in other.named_modules():
        _refit(path, module, changed)
    forget_cached(other)
    if example_input is not None:
        _try(model, other, example_input)
    return other


def load_model(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Return a copy of a model with the weights of a file, also if weldnet widened the network in it.

    Args:
        path: a checkpoint, as for :func:`load`. A ``.safetensors`` file written after ``fuse(size=...)`` says so in
            its metadata; the copy is then as wide as the network in it.
        model: the architecture at its own width; not changed.

    Raises:
        CheckpointError: the file cannot be read or does not fit the model.
        ModelError: the model cannot be made that wide.
    """
    state, _, _ = match_prefix(load(path), model)
    other = copy.deepcopy(model) if read_widths(path) is None else resized(model, state)
    load_into(other, state, Path(path).stem)
    return other


def read_widths(path: str | os.PathLike[str]) -> dict[str, int] | None:
    """Return how many units each widened space has, from a file's metadata; None for networks of their usual width.

    Raises:
        CheckpointError: the file cannot be read.
    """
    text = read_metadata(path).get(WIDTHS)
    try:
        widths = None if text is None else json.loads(text)
    except ValueError:
        widths = {}
    return widths if isinstance(widths, dict) else None


# -- tensors ---------------------------------------------------------------------------------------


def _replace_tensors(model: nn.Module, wanted: Mapping[str, torch.Size]) -> set[int]:
    """Give tensors new shapes, tied ones together; return the ids of the modules that hold one."""
    new: dict[int, Tensor] = {}
    parameters = {id(p) for p in model.parameters()}
    for key, tensor in model.state_dict(keep_vars=True).items():
        shape = wanted.get(key)
        if shape is None or shape == tensor.shape:
            continue
        zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        is_parameter = id(tensor) in parameters
        new[id(tensor)] = nn.Parameter(zeros, requires_grad=tensor.requires_grad) if is_parameter else zeros
    changed: set[int] = set()
    for module in model.modules():
        own = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own:
            if id(tensor) in new:
                setattr(module, name, new[id(tensor)])
                changed.add(id(module))
    return changed


# -- modules ---------------------------------------------------------------------------------------


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _convolution(module: _ConvNd) -> None:
    rows, columns = module.weight.shape[:2]
    transposed = isinstance(module, _ConvTransposeNd)
    before = module.in_channels if transposed else module.out_channels
    if module.groups > 1 and rows != before:  # each group stays as it is: there are more of them
        if rows * module.groups % before:
            raise ModelError(f"{before} channels in {module.groups} groups cannot become {rows}")
        module.groups = rows * module.groups // before
    both = (rows, columns * module.groups)
    module.in_channels, module.out_channels = both if transposed else both[::-1]


def _norm(module: _NormBase) -> None:
    module.num_features = len(module.weight if module.affine else module.running_mean)  # pyright: ignore[reportArgumentType]


def _group_norm(module: nn.GroupNorm) -> None:
    module.num_channels = len(module.weight)


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _embedding(module: nn.Embedding) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.numel()


def _bilinear(module: nn.Bilinear) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


_REFITS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], None]], ...] = (
    (nn.Linear, _linear),
    (_ConvNd, _convolution),
    (_NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.Bilinear, _bilinear),
)


def _refit(path: str, module: nn.Module, changed: set[int]) -> None:
    """Keep a module's own sizes true; a user's own module has none that weldnet knows, and the forward pass decides."""
    if id(module) not in changed:
        return
    for kind, refit in _REFITS:
        if isinstance(module, kind):
            try:
                refit(module)
            except ModelError as error:
                raise ModelError(f"{path!r}: {error}; keep its width") from None
            return
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers
        weight = module.weight
        assert isinstance(weight, Tensor)
        vars(module).update(zip(("nx", "nf"), weight.shape, strict=True))
    elif type(module).__module__.startswith("torch.nn.modules"):
        raise ModelError(
            f"{path!r} is a {type(module).__name__}, whose sizes weldnet cannot change; keep its width, or build the "
            "model wider yourself"
        )


# -- the trial -------------------------------------------------------------------------------------


def _try(model: nn.Module, other: nn.Module, example_input: Any) -> None:
    expected = _shapes(model, example_input)
    try:
        got = _shapes(other, example_input)
        reason = "" if got == expected else f"it answers in the shapes {got}, not {expected}"
    except Exception as error:  # whatever a user's forward pass may raise
        reason = str(error).partition("\n")[0]
    if reason:
        raise ModelError(
            f"{type(model).__name__} does not run at other widths: {reason}; its forward pass takes a width for "
            "granted (as view(-1, 512) does): read it from the tensor, or keep the width"
        )


def _shapes(model: nn.Module, example_input: Any) -> list[tuple[int, ...]]:
    with evaluation_mode(model):
        if isinstance(example_input, Mapping):
            answer = model(**example_input)
        else:
            answer = model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
