"""One forward pass, written down as a flat list of functional ATen operations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from weldnet.errors import CaptureError, ModelError

__all__ = ["Operation", "Ref", "Trace", "call", "call_arguments", "output_tensors", "own_inputs", "trace"]


@dataclass(frozen=True)
class Ref:
    """A tensor of the trace: its number, shape and dtype. The value itself is not kept."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """One ATen call. Tensors among the arguments are :class:`Ref`, everything else is as it was."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]

    @property
    def name(self) -> str:
        """The operation without its overload, such as ``aten.add``."""
        return str(self.func.overloadpacket)

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among the arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Trace:
    """A forward pass: parameters and buffers by name, the operations that lead to the outputs, the outputs.

    ``constants`` are the tensors that are neither parameters nor inputs nor made by an operation.
    """

    tensors: Mapping[str, Ref]
    aliases: Mapping[str, str]
    operations: tuple[Operation, ...]
    outputs: tuple[Ref, ...]
    values: tuple[tuple[Tensor, ...], ...] = ()
    constants: tuple[Tensor, ...] = ()


def call_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read an example input: a mapping is keyword arguments, a tuple or list positional ones, else one tensor."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    return (example_input,), {}


def call(model: nn.Module, state: Mapping[str, Tensor] | None, example_input: Any) -> Any:
    """Run the model on the example input, with ``state`` in place of its own tensors if given.

    A forward pass that changes its own buffers changes copies, and the random generator stays as it was.

    Raises:
        ModelError: the forward pass failed; the message gives the shapes and the model's own reason.
    """
    args, kwargs = call_arguments(own_inputs(example_input))
    full = dict(state or {})
    full.update({name: full.get(name, own).clone() for name, own in model.named_buffers(remove_duplicate=False)})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if not full:
                return model(*args, **kwargs)
            return torch.func.functional_call(model, full, args, kwargs, tie_weights=False)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} fails on the example input {_shapes(example_input)}: {_one_line(error)}; "
            "give an input of the shape and dtype that the model was made for"
        ) from error


def trace(model: nn.Module, example_input: Any, *, keep_values: bool = False) -> Trace:
    """Trace one forward pass of a copy of ``model`` in eval mode.

    Args:
        model: not changed.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        keep_values: also keep the value of every operation's outputs (memory!).

    Raises:
        ModelError: the forward pass itself fails on this input.
        CaptureError: the forward pass runs, but not under the tracer.
    """
    model = _own_copy(model)
    state, aliases = named_tensors(model)
    call(model, None, example_input)  # a model that fails without the tracer is a different error
    recorder = _Recorder(state, keep_values)
    args, kwargs = call_arguments(own_inputs(example_input))

    def forward(state: dict[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        full = {**state, **{alias: state[name] for alias, name in aliases.items()}}
        result = torch.func.functional_call(model, full, args, kwargs, tie_weights=False)
        return output_tensors(result)

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _plain_kernels(), recorder:
            outputs = torch.func.functionalize(forward, remove="mutations")(state, args, kwargs)
    except CaptureError:
        raise
    except Exception as error:
        last = f" after {recorder.operations[-1].name}" if recorder.operations else ""
        raise CaptureError(
            f"{type(model).__name__} cannot be traced{last}: {_one_line(error)}; "
            "make this step plain tensor code, or pass the submodule around it"
        ) from error
    if not outputs:
        raise CaptureError(f"{type(model).__name__} returns no tensor; give a model whose forward returns one")
    refs = tuple(recorder.ref(t) for t in outputs)
    keep = _live(recorder.operations, refs)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return Trace(
        tensors={name: recorder.ref(tensor) for name, tensor in state.items()},
        aliases=aliases,
        operations=tuple(recorder.operations[i] for i in keep),
        outputs=refs,
        values=tuple(recorder.values[i] for i in keep) if keep_values else (),
        constants=recorder.foreign([*state.values(), *inputs]),
    )


def own_inputs(example_input: Any) -> Any:
    """Copy the tensors of an input: a forward pass may write into them."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), example_input)


def output_tensors(result: Any) -> list[Tensor]:
    """Return every tensor in what a forward pass returns: tuples, lists, dicts and dataclasses of them.

    Raises:
        CaptureError: something in it is of a type that may hide tensors.
    """
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found += output_tensors(getattr(leaf, field.name))
        elif not isinstance(leaf, None | bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            raise CaptureError(
                f"the forward pass returns a {type(leaf).__name__}, which may hide tensors; "
                "return tensors, tuples, dicts or dataclasses"
            )
    return found


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the state dict by name, and names that share a tensor with an earlier name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, aliases


class _Recorder(TorchDispatchMode):
    """Writes operations down as they reach the dispatcher; tensors get numbers, values are kept only if asked."""

    def __init__(self, state: Mapping[str, Tensor], keep_values: bool) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.values: list[tuple[Tensor, ...]] = []
        self._keep_values = keep_values
        self._refs: dict[int, Ref] = {}
        self._alive: list[Tensor] = []  # numbers are object identities: nothing may be freed meanwhile
        for tensor in state.values():
            self.ref(tensor)

    def ref(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._refs:
            self._refs[id(tensor)] = Ref(len(self._refs), tuple(tensor.shape), tensor.dtype)
            self._alive.append(tensor)
        return self._refs[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        as_refs = pytree.tree_map_only(Tensor, self.ref, (tuple(args), dict(kwargs)))
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:  # inside a composite operation, where functionalize does not see it
            seen = self._changed_by(func, args, kwargs)
            outputs += [t for t in seen if not any(t is known for known in outputs)]
            as_refs = (as_refs[0], {**as_refs[1], "changed": [self.ref(t) for t in seen]})
        self.operations.append(Operation(func, as_refs[0], as_refs[1], tuple(self.ref(t) for t in outputs)))
        if self._keep_values:
            self.values.append(tuple(t.detach() for t in outputs))
        return result

    def foreign(self, known: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors that operations use although no operation made them, except known ones."""
        made = {ref.number for op in self.operations for ref in op.outputs} | {self.ref(t).number for t in known}
        used = dict.fromkeys(ref.number for op in self.operations for ref in op.inputs)
        return tuple(self._alive[number] for number in used if number not in made)

    def _changed_by(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Every tensor so far that shares memory with what an operation writes to."""
        arguments = func._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        memory = {_memory(t) for t in pytree.tree_leaves(written) if isinstance(t, Tensor)}
        return [t for t in self._alive if _memory(t) in memory]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _live(operations: Sequence[Operation], outputs: Sequence[Ref]) -> list[int]:
    """Return the indices of the operations that the outputs depend on, in order."""
    needed = {ref.number for ref in outputs}
    keep: list[int] = []
    for i in reversed(range(len(operations))):
        leaves = not operations[i].outputs  # a number taken out of a tensor may steer the rest of the pass
        if leaves or any(ref.number in needed for ref in operations[i].outputs):
            keep.append(i)
            needed.update(ref.number for ref in operations[i].inputs)
    return keep[::-1]


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused attention paths hide their parts; the plain ones compute the same from visible operations."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _own_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({_one_line(error)}); "
            "weldnet traces a copy so that yours stays as it is: give a freshly built model"
        ) from error


def _shapes(example_input: Any) -> str:
    def describe(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        return type(leaf).__name__

    return ", ".join(describe(leaf) for leaf in pytree.tree_leaves(example_input))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
