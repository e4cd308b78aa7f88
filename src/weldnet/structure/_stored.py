"""Models larger than memory: built without weights, and run with weights that are read when an operation needs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from weldnet._modules import bare, forget_cached
from weldnet.errors import ModelError, StructureError
from weldnet.structure._copies import one_line, own_copy, own_inputs
from weldnet.structure._meta import memory, off_meta, twin_on_meta
from weldnet.structure._move import renumber
from weldnet.structure._outputs import output_tensors
from weldnet.structure._referee import LOW_PRECISION_TOLERANCE, TOLERANCE, relative_change, stays_double
from weldnet.structure._spec import Structure
from weldnet.structure._trace import call_arguments

__all__ = ["StoredReferee", "build_weightless", "without_weights"]


def build_weightless(factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose parameters never take memory: each goes to the meta device as it is registered.

    One that is registered under several names stays one. Buffers that are not in the state dict (tables, masks) are
    computed as ever.
    """
    register = nn.Module.register_parameter
    known = WeakTensorKeyDictionary()

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = known.setdefault(param, nn.Parameter(twin_on_meta(param.data), param.requires_grad))
        register(module, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta):
        model = factory()
    return without_weights(model)


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose tensors in the state dict are on the meta device; the other buffers stay."""
    state = bare(model).state_dict(keep_vars=True)
    memo: dict[int, Any] = {id(t): twin_on_meta(t) for t in state.values() if isinstance(t, Tensor)}
    return copy.deepcopy(bare(model), memo).eval()


@final
class StoredReferee:
    """What a model answers in float64, with weights that are read operation by operation and renumbered on the way.

    Args:
        model: without weights, see :func:`build_weightless`; not changed.
        example_input: as for :func:`weldnet.capture`.
        structure: where the units lie, and which outputs count.
        weights: gives a tensor of the state dict by its name.

    Raises:
        ModelError: the model fails on the input, or does more with a weight than torch operations.
        StructureError: it answers with NaN or Inf.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, structure: Structure, weights: Callable[[str], Tensor]
    ) -> None:
        self._model = own_copy(model).double()
        self._input = pytree.tree_map_only(
            Tensor, lambda t: t.detach().cpu().double() if t.is_floating_point() else t.detach().cpu(), example_input
        )
        self._structure, self._weights = structure, weights
        state = self._model.state_dict(keep_vars=True)
        self._names = {memory(t): name for name, t in reversed(state.items()) if isinstance(t, Tensor) and t.is_meta}
        exact = stays_double(self._model, self._input, structure.outputs)
        self.tolerance = TOLERANCE if exact else LOW_PRECISION_TOLERANCE
        self._expected = self._answer({})
        if not all(bool(torch.isfinite(t).all()) for t in self._expected):
            raise StructureError(
                f"{type(model).__name__} answers with NaN or Inf on the example input: the check can prove nothing; "
                "give an input in the range that the model was trained on"
            )

    def error(self, sources: Mapping[str, Tensor]) -> float:
        """Return the largest relative change of the output when spaces are renumbered along integer sources."""
        return relative_change(self._answer(sources), self._expected)

    def _answer(self, sources: Mapping[str, Tensor]) -> list[Tensor]:
        def read(name: str) -> Tensor:
            tensor = renumber({name: self._weights(name)}, self._structure, sources)[name]
            return tensor.double() if tensor.is_floating_point() else tensor

        forget_cached(self._model)
        args, kwargs = call_arguments(own_inputs(self._input))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), _Paged(self._names, read):
                return output_tensors(self._model(*args, **kwargs), self._structure.outputs)
        except Exception as error:
            raise ModelError(
                f"{type(self._model).__name__} cannot be run with weights from disk ({one_line(error)}); leave the "
                "proof out (--no-check), or check a smaller network of this class"
            ) from error


class _Paged(TorchDispatchMode):
    """Gives every operation real weights in place of those on the meta device, and forgets them after it."""

    def __init__(self, names: Mapping[int, str], read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._names, self._read = names, read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._real, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _real(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return off_meta(leaf)
        name = self._names.get(memory(leaf))
        if name is None:
            raise RuntimeError("it uses a tensor on the meta device that is none of its weights")
        tensor = self._read(name)
        same = leaf.shape == tensor.shape
        return tensor if same else tensor.as_strided(leaf.size(), leaf.stride(), leaf.storage_offset())
