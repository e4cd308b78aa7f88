"""Copies of models, in which tensors that share memory still do, and the names of such tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weldnet._modules import forget_cached
from weldnet.errors import CaptureError
from weldnet.structure._meta import memory, twin_on_meta

__all__ = [
    "named_tensors",
    "one_line",
    "overlap",
    "own_copy",
    "own_inputs",
    "positions_in_memory",
    "refuse_other_views",
    "tie",
]

#: Up to this many elements overlap is found out element by element.
_ENUMERATED = 1 << 20


def own_copy(model: nn.Module, *, weightless: bool = False) -> nn.Module:
    """Copy a model to the CPU, in eval mode; what shares memory in the model does so in the copy.

    On a GPU the same model runs as other operations (fused recurrent cells, say). On the CPU it is the same everywhere.

    Args:
        model: not changed; what is on the meta device stays there.
        weightless: put the copy on the meta device.

    Raises:
        CaptureError: the model cannot be copied, or weights of it share a part of their memory.
    """
    _refuse_partial_sharing(model)
    if weightless:
        refuse_other_views(model, _persistent(model), _held(model))
    memo: dict[int, Any] = _on_meta(model) if weightless else {**_from_afar(model), **_with_shared_memory(model)}
    try:
        own = copy.deepcopy(model, memo).eval()
    except Exception as error:
        if "graph leaves" in str(error):
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: it holds a tensor that was computed from its parameters; "
                "detach it, or for weight normalisation use torch.nn.utils.parametrizations.weight_norm"
            ) from error
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}); "
            "weldnet traces a copy so that yours stays as it is: give a freshly built model"
        ) from error
    for module in own.modules():  # a forward pass may make tensors where its module says
        vars(module).update({n: _end(v) for n, v in vars(module).items() if isinstance(v, torch.device)})
    forget_cached(own)
    return own


def own_inputs(example_input: Any) -> Any:
    """Copy the tensors of an input to the CPU, as :func:`own_copy` does: a forward pass may write into them."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(_end(t.device), copy=True), example_input)


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the state dict by name, and names that mean the same elements as an earlier name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, tensor in _persistent(model).items():
        seen = _elements(tensor)
        if seen in first:
            aliases[name] = first[seen]
        else:
            first[seen] = name
            tensors[name] = tensor.detach()
    return tensors, aliases


def tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Put one tensor under the names that mean one, in place: a conversion may have torn them apart."""
    for alias, name in aliases.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        owner, _, leaf = alias.rpartition(".")
        module = model.get_submodule(owner)
        own = module._parameters if leaf in module._parameters else module._buffers  # pyright: ignore[reportPrivateUsage]
        own[leaf] = tensor


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _elements(tensor: Tensor) -> Hashable:
    """Return what is the same for two tensors if they are the same elements in the same shape."""
    if not (_is_plain(tensor) and tensor.numel()):
        return id(tensor)
    return memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized


# -- copies that share what their originals share --------------------------------------------------


def _end(device: torch.device) -> torch.device:
    """Where the copy of what lies on a device is to lie."""
    return device if device.type == "meta" else torch.device("cpu")


def _from_afar(model: nn.Module) -> dict[int, Tensor]:
    """Copy the tensors that are on another device to the CPU, by identity."""
    memo: dict[int, Tensor] = {}
    for tensor in _held(model):
        if tensor.is_leaf and tensor.device != _end(tensor.device):
            near = tensor.detach().cpu()
            memo[id(tensor)] = nn.Parameter(near, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else near
    return memo


def _with_shared_memory(model: nn.Module) -> dict[int, Tensor]:
    """Copy tensors that share memory, by identity: ``copy.deepcopy`` of a parameter would tear them apart."""
    memo: dict[int, Tensor] = {}
    for sharing in _by_memory([t for t in _held(model) if t.is_leaf]):
        if len(sharing) > 1:
            storage = sharing[0].untyped_storage()
            own = torch.UntypedStorage(storage.nbytes(), device=_end(storage.device))
            memo |= _views(sharing, own if storage.device.type == "meta" else own.copy_(storage))
    return memo


def _on_meta(model: nn.Module) -> dict[int, Tensor]:
    """Return a tensor on the meta device for each parameter and buffer, by identity.

    ``model.to("meta")`` would tear tied parameters apart.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): twin_on_meta(tensor) for tensor in tensors}
    for sharing in _by_memory(tensors):
        memo |= _views(sharing, torch.UntypedStorage(sharing[0].untyped_storage().nbytes(), device="meta"))
    return memo


def _views(tensors: Sequence[Tensor], storage: torch.UntypedStorage) -> dict[int, Tensor]:
    """Return a twin of each tensor in other memory, by identity."""
    memo: dict[int, Tensor] = {}
    for tensor in tensors:
        twin = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        twin.set_(storage, int(tensor.storage_offset()), tensor.shape, tensor.stride())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return memo


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter, buffer and attribute that is a tensor."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _by_memory(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group distinct plain tensors by the memory that they lie in."""
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if _is_plain(tensor) and tensor.numel():
            groups.setdefault(memory(tensor), {})[id(tensor)] = tensor
    return [list(group.values()) for group in groups.values()]


# -- weights that share a part of their memory -----------------------------------------------------


def _refuse_partial_sharing(model: nn.Module) -> None:
    """Refuse weights of which one is a part of another, or another view: moving one would move the other."""
    state = _persistent(model)
    names = {id(tensor): name for name, tensor in reversed(state.items())}
    for sharing in _by_memory([tensor for tensor in state.values() if _floats(tensor)]):
        for a, b in itertools.combinations(sharing, 2):
            if _elements(a) != _elements(b) and overlap(a, b):
                raise CaptureError(
                    f"{type(model).__name__}: {names[id(a)]!r} {list(a.shape)} and {names[id(b)]!r} {list(b.shape)} "
                    "share a part of their memory, so that neither can be renumbered by itself; make one of them a "
                    "copy (.clone()), or let the forward pass take the part from the whole"
                )


def refuse_other_views(model: nn.Module, state: Mapping[str, Tensor], others: Iterable[Tensor]) -> None:
    """Refuse tensors that lie in the memory of a weight, but are none of the tensors of the state dict.

    Raises:
        CaptureError: there is one; the message names the weight.
    """
    weights = {name: tensor for name, tensor in state.items() if _floats(tensor)}
    known = {id(tensor) for tensor in state.values()}
    memories = {memory(tensor) for tensor in weights.values()}
    for other in others:
        if id(other) in known or other.layout != torch.strided or memory(other) not in memories:
            continue
        for name in (name for name, tensor in weights.items() if overlap(tensor, other)):
            raise CaptureError(
                f"{type(model).__name__} cannot be traced: a tensor {list(other.shape)} that is not in its state "
                f"dict shares the memory of {name!r}; let the forward pass take it from {name!r} itself"
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements in common; of large tensors with gaps, whether they may have."""
    if memory(a) != memory(b):
        return False
    (start_a, end_a), (start_b, end_b) = _extent(a), _extent(b)
    if end_a <= start_b or end_b <= start_a:
        return False
    if a.dtype != b.dtype or max(a.numel(), b.numel()) > _ENUMERATED:
        return True
    first, second = (positions_in_memory(t.shape, t.stride(), int(t.storage_offset())) for t in (a, b))
    return bool(np.intersect1d(first, second).size)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its memory and the one after its last."""
    size, start = tensor.element_size(), int(tensor.storage_offset())
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + steps + 1) * size if tensor.numel() else start * size


def positions_in_memory(shape: Sequence[int], strides: Sequence[int], offset: int) -> np.ndarray:
    """Return where the elements of a tensor lie in its memory, in the tensor's shape."""
    places = np.array(offset)
    for size, stride in zip(shape, strides, strict=True):
        places = np.add.outer(places, np.arange(size) * stride)
    return places


def one_line(error: BaseException) -> str:
    """Return what an error says, or else its type, on one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
