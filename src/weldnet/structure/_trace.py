"""One forward pass, written down as a flat list of functional ATen operations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from weldnet.errors import CaptureError, ModelError, WeldnetError
from weldnet.structure._copies import (
    named_tensors,
    one_line,
    overlap,
    own_copy,
    own_inputs,
    positions_in_memory,
    refuse_other_views,
)
from weldnet.structure._exits import Exits
from weldnet.structure._meta import NO_VALUE, has_values, memory, off_meta, standing_in
from weldnet.structure._outputs import (
    ANSWER,
    CACHE,
    LEAVE_OUT,
    NAME_SOME,
    Output,
    find_outputs,
    output_tensors,
    refuse_opaque,
    select_outputs,
)

__all__ = [
    "Operation",
    "Ref",
    "Trace",
    "call",
    "call_arguments",
    "decompose",
    "live",
    "offsets",
    "outputs_that_count",
    "plain_kernels",
    "trace",
    "visible_outputs",
]


@dataclass(frozen=True)
class Ref:
    """A tensor of the trace: its number, shape, dtype and place in memory. The value itself is not kept."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Operation:
    """One ATen call. Tensors among the arguments are :class:`Ref`, everything else is as it was.

    ``changed`` are other tensors that share the memory which the call writes to.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    changed: tuple[Ref, ...] = ()

    @property
    def name(self) -> str:
        """The operation without its overload and without the mark of writing in place, such as ``aten.add``."""
        return str(self.func.overloadpacket).removesuffix("_")

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among the arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Trace:
    """A forward pass: parameters and buffers by name, the operations that lead to the outputs, the outputs.

    ``selected`` are the key paths of the outputs, none of them if nothing was left out. ``constants`` are the tensors
    that are neither parameters nor inputs nor made by an operation; ``known`` are the values, by number, of integer and
    boolean tensors that depend on neither parameters nor inputs.
    """

    tensors: Mapping[str, Ref]
    aliases: Mapping[str, str]
    operations: tuple[Operation, ...]
    outputs: tuple[Ref, ...]
    selected: tuple[str, ...] = ()
    values: tuple[tuple[Tensor, ...], ...] = ()
    constants: tuple[Tensor, ...] = ()
    known: Mapping[int, Tensor] = dataclasses.field(default_factory=dict[int, Tensor])


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
        CaptureError: it reads a value that depends on weights, of which there are none.
    """
    args, kwargs = call_arguments(own_inputs(example_input))
    full = dict(state or {})
    full.update({name: full.get(name, own).clone() for name, own in model.named_buffers(remove_duplicate=False)})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), standing_in(model):
            if not full:
                return model(*args, **kwargs)
            return torch.func.functional_call(model, full, args, kwargs, tie_weights=False)
    except NO_VALUE as error:
        raise CaptureError(
            f"{type(model).__name__} has no weights (meta device) and its forward pass reads a value that depends on "
            f"them ({one_line(error)}); load weights first"
        ) from error
    except Exception as error:
        way_out = "give an input of the shape and dtype that the model was made for"
        if isinstance(error, OSError):
            way_out = "a forward pass must need no network and no file: load what it needs when the model is built"
        elif "device" in str(error):
            way_out = "a copy of it runs on the CPU: let the forward pass take devices from its inputs or weights"
        raise ModelError(
            f"{type(model).__name__} fails on the example input {_shapes(example_input)}: {one_line(error)}; {way_out}"
        ) from error


def trace(
    model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None = None, *, keep_values: bool = False
) -> Trace:
    """Trace one forward pass of a copy of ``model`` in eval mode.

    Args:
        model: not changed.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        outputs: key paths of what counts as output, as for :func:`weldnet.capture`.
        keep_values: also keep the value of every operation's outputs (memory!).

    Raises:
        ModelError: the forward pass itself fails on this input.
        UsageError: it has no such output.
        CaptureError: the forward pass runs, but not under the tracer.
    """
    # A model that fails without the tracer is a different error; and the first pass in eval mode may leave tables
    # behind that the next one uses in place of weights, so the trace has a copy of its own.
    every = find_outputs(call(own_copy(model), None, example_input))
    visible = visible_outputs(model, every, outputs)
    model = own_copy(model)
    state, aliases = named_tensors(model)
    args, kwargs = call_arguments(own_inputs(example_input))
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    recorder = _Recorder(state, inputs, keep_values)

    def forward(state: dict[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        full = {**state, **{alias: state[name] for alias, name in aliases.items()}}
        with Exits(recorder.depends_on_weights) as exits:
            result = torch.func.functional_call(model, full, args, kwargs, tie_weights=False)
        exits.refuse()
        return output_tensors(result, [output.path for output in visible])

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), plain_kernels(model), standing_in(model), recorder:
            tensors = torch.func.functionalize(forward, remove="mutations")(state, args, kwargs)
    except WeldnetError:
        raise
    except Exception as error:
        last = f" after {recorder.operations[-1].name}" if recorder.operations else ""
        raise CaptureError(
            f"{type(model).__name__} cannot be traced{last}: {one_line(error)}; "
            "make this step plain tensor code, or pass the submodule around it"
        ) from error
    constants = recorder.foreign([*state.values(), *inputs])
    refuse_other_views(model, state, constants)
    recorder.forget_unread_changes({recorder.ref(t).number for t in tensors})
    chosen = outputs_that_count(visible, [recorder.ref(t) for t in tensors], recorder.operations, len(state))
    refs = tuple(chosen.values())
    keep = live(recorder.operations, refs)
    return Trace(
        tensors={name: recorder.ref(tensor) for name, tensor in state.items()},
        aliases=aliases,
        operations=tuple(recorder.operations[i] for i in keep),
        outputs=refs,
        selected=tuple(chosen) if len(chosen) < len(every) else (),
        values=tuple(recorder.values[i] for i in keep) if keep_values else (),
        constants=constants,
        known=recorder.known(),
    )


class _Recorder(TorchDispatchMode):
    """Writes operations down as they reach the dispatcher; tensors get numbers, values are kept only if asked."""

    def __init__(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor], keep_values: bool) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.values: list[tuple[Tensor, ...]] = []
        self._keep_values = keep_values
        self._refs: dict[int, Ref] = {}
        self._alive: list[Tensor] = []  # numbers are object identities: nothing may be freed meanwhile
        weights = [self.ref(tensor) for tensor in state.values()]
        self._varying = {r.number for r in weights if r.dtype.is_floating_point or r.dtype.is_complex}
        self._weighted = set(self._varying)
        self._memories = {memory(self._alive[number]) for number in self._weighted}
        self._varying |= {self.ref(tensor).number for tensor in inputs}

    def ref(self, tensor: Tensor) -> Ref:
        return self._refs.get(id(tensor)) or self._number(tensor)

    def _note(self, leaf: Any) -> Any:
        return self.ref(leaf) if isinstance(leaf, Tensor) else off_meta(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, such as its device: nothing is computed
            return func(*args, **kwargs)
        as_refs = pytree.tree_map(self._note, (tuple(args), dict(kwargs)))
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        changed: tuple[Ref, ...] = ()
        if torch.Tag.inplace_view in func.tags:  # the same object is another tensor from here on
            refs = tuple(self._number(t) for t in outputs)
        else:
            refs = tuple(self.ref(t) for t in outputs)
            if func._schema.is_mutable:  # inside a composite operation, where functionalize does not see it
                written = self._written(func, args, kwargs)
                changed = tuple(self.ref(t) for t in self._sharing(written) if not any(t is w for w in written))
                refs += tuple(self.ref(t) for t in written if not any(t is known for known in outputs))
                self._varying |= {ref.number for ref in (*refs, *changed)}
        operation = Operation(func, as_refs[0], as_refs[1], refs, changed)
        self.operations.append(operation)
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        if seeded or any(ref.number in self._varying for ref in operation.inputs):
            self._varying |= {ref.number for ref in refs}
        if any(ref.number in self._weighted for ref in operation.inputs):
            self._weighted |= {ref.number for ref in (*refs, *changed)}
        if self._keep_values:
            self.values.append(tuple(t.detach() for t in outputs))
        return result

    def depends_on_weights(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight, shares memory with one, or was computed from one."""
        ref = self._refs.get(id(tensor))
        return (ref is not None and ref.number in self._weighted) or memory(tensor) in self._memories

    def foreign(self, known: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors that operations use although no operation made them, except known ones."""
        made = {ref.number for op in self.operations for ref in op.outputs if ref not in op.inputs}
        made |= {self.ref(t).number for t in known}
        used = dict.fromkeys(ref.number for op in self.operations for ref in op.inputs)
        return tuple(self._alive[number] for number in used if number not in made)

    def known(self) -> dict[int, Tensor]:
        """Return the integer and boolean tensors that depend on neither parameters nor inputs."""
        steady = ((n, t) for n, t in enumerate(self._alive) if n not in self._varying)
        return {n: t for n, t in steady if has_values(t) and not (t.is_floating_point() or t.is_complex())}

    def forget_unread_changes(self, results: set[int]) -> None:
        """Leave out of every operation's changes what nothing reads afterwards; ``results`` are read in the end."""
        read = set(results)
        for i in reversed(range(len(self.operations))):
            op = self.operations[i]
            if op.changed:
                kept = tuple(ref for ref in op.changed if ref.number in read)
                self.operations[i] = op = dataclasses.replace(op, changed=kept)
            read.update(ref.number for ref in op.inputs)

    def _number(self, tensor: Tensor) -> Ref:
        strides, offset = tuple(tensor.stride()), int(tensor.storage_offset())
        ref = Ref(len(self._alive), tuple(tensor.shape), tensor.dtype, strides, offset)
        self._alive.append(tensor)
        self._refs[id(tensor)] = ref
        return ref

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that an operation writes to."""
        arguments = func._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return [t for t in pytree.tree_leaves(written) if isinstance(t, Tensor)]

    def _sharing(self, written: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor so far that has elements in common with these."""
        return [t for t in self._alive if any(overlap(t, w) for w in written)]


def offsets(ref: Ref) -> np.ndarray:
    """Where the elements of a tensor lie in their storage, in the tensor's shape."""
    return positions_in_memory(ref.shape, ref.strides, ref.offset)


def decompose(op: Operation, numbers: Iterator[int]) -> tuple[Operation, ...] | None:
    """Write an operation as simpler ones, as torch defines it, or return None where torch does not say.

    Args:
        op: any operation.
        numbers: for the tensors in between.
    """
    from torch._decomp import decomposition_table

    recipe = decomposition_table.get(op.func)
    if recipe is None or op.changed:
        return None
    stand_ins: dict[int, Tensor] = {}

    def stand_in(ref: Ref) -> Tensor:
        made = torch.empty_strided(ref.shape, ref.strides, dtype=ref.dtype, device="meta")
        return stand_ins.setdefault(ref.number, made)

    args, kwargs = pytree.tree_map_only(Ref, stand_in, (op.args, op.kwargs))
    kwargs = {k: "meta" if k == "device" else v for k, v in kwargs.items()}
    recorder = _Recorder({}, list(stand_ins.values()), keep_values=False)
    try:
        with recorder:
            result = recipe(*args, **kwargs)
    except Exception:
        return None  # it looks at values
    made = [recorder.ref(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    names = {recorder.ref(t).number: number for number, t in stand_ins.items()}
    names |= {ref.number: old.number for ref, old in zip(made, op.outputs, strict=False)}
    if len(made) != len(op.outputs) or len(set(names.values())) != len(names):
        return None

    def renamed(ref: Ref) -> Ref:
        if ref.number not in names:
            names[ref.number] = next(numbers)
        return dataclasses.replace(ref, number=names[ref.number])

    return tuple(
        dataclasses.replace(
            part,
            args=pytree.tree_map_only(Ref, renamed, part.args),
            kwargs=pytree.tree_map_only(Ref, renamed, part.kwargs),
            outputs=tuple(renamed(ref) for ref in part.outputs),
            changed=tuple(renamed(ref) for ref in part.changed),
        )
        for part in recorder.operations
    )


#: Operations that raise or do nothing.
_ASSERTIONS = frozenset({"aten._linalg_check_errors", "aten._assert_async", "aten._functional_assert_async"})
#: Operations that ask a tensor for its shape and nothing else.
_SHAPE_ONLY = frozenset(
    f"aten.{made}" for kind in ("zeros", "ones", "full", "empty") for made in (f"{kind}_like", f"new_{kind}")
)


def live(operations: Sequence[Operation], outputs: Sequence[Ref]) -> list[int]:
    """Return the indices of the operations that the outputs depend on, in order."""
    needed = {ref.number for ref in outputs}
    keep: list[int] = []
    for i in reversed(range(len(operations))):
        # A number taken out of a tensor may steer the rest of the pass; an assertion gives none.
        leaves = not operations[i].outputs and operations[i].name not in _ASSERTIONS
        if leaves or any(ref.number in needed for ref in (*operations[i].outputs, *operations[i].changed)):
            keep.append(i)
            needed.update(ref.number for ref in operations[i].changed)
            if operations[i].name not in _SHAPE_ONLY:
                needed.update(ref.number for ref in operations[i].inputs)
    return keep[::-1]


def visible_outputs(model: nn.Module, every: Sequence[Output], outputs: str | Sequence[str] | None) -> list[Output]:
    """Return the outputs to trace: those asked for, or all that may turn out to count.

    Raises:
        UsageError: one that was asked for is not there.
        CaptureError: there are none, or one of them may hide tensors.
    """
    if outputs is not None:
        chosen = select_outputs(every, outputs)
        refuse_opaque(chosen, LEAVE_OUT)
        visible = [dataclasses.replace(output, role=ANSWER) for output in chosen]
    else:
        refuse_opaque([output for output in every if output.role == ANSWER], NAME_SOME)
        visible = [output for output in every if output.role != CACHE and isinstance(output.value, Tensor)]
    if not visible:
        raise CaptureError(f"{type(model).__name__} returns no tensor; give a model whose forward returns one")
    return visible


def outputs_that_count(
    visible: Sequence[Output], refs: Sequence[Ref], operations: Sequence[Operation], weights: int
) -> dict[str, Ref]:
    """Return the outputs that count: the answer, and by-products that have weights of their own.

    Those weights would stay behind when the units that they read are renumbered. The first ``weights`` numbers of a
    trace are the model's own tensors.
    """

    def read(chosen: Sequence[Ref]) -> set[int]:
        steps = [operations[i] for i in live(operations, chosen)]
        return {ref.number for op in steps for ref in op.inputs if ref.number < weights}

    known = read([ref for output, ref in zip(visible, refs, strict=True) if output.role == ANSWER])
    return {
        output.path: ref
        for output, ref in zip(visible, refs, strict=True)
        if output.role == ANSWER or not read([ref]) <= known
    }


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Fused attention and recurrent kernels hide their parts; the plain ones compute the same visibly."""
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.mkldnn.enabled = False
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = fused


def _shapes(example_input: Any) -> str:
    def describe(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        return type(leaf).__name__

    return ", ".join(describe(leaf) for leaf in pytree.tree_leaves(example_input))
