"""The second route to a trace: ``torch.export`` of a copy, read as the same flat list of operations."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from weldnet.errors import CaptureError, WeldnetError
from weldnet.structure._copies import named_tensors, one_line, own_copy, own_inputs
from weldnet.structure._meta import has_values, has_weights, off_meta
from weldnet.structure._outputs import Output, find_outputs
from weldnet.structure._trace import (
    Operation,
    Ref,
    Trace,
    call,
    call_arguments,
    live,
    outputs_that_count,
    plain_kernels,
    visible_outputs,
)
from weldnet.structure.rules import knows

__all__ = ["export_trace"]

#: Operations that only look at a tensor's shape, dtype or device; they compute nothing.
_QUESTIONS = frozenset({"aten._assert_tensor_metadata", "aten.sym_size", "aten.sym_stride", "aten.sym_numel"})
#: Regions that change how autograd or autocast work, and not what is computed: their operations are read in place.
_REGIONS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})


def export_trace(model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None = None) -> Trace:
    """Trace one forward pass of a copy of ``model`` in eval mode with ``torch.export``.

    The graph is not strict (plain Python runs as it is), functional, and decomposed into core ATen operations, except
    those that a rule knows as they are.

    Args:
        model: not changed; its parameters may be on the meta device.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        outputs: key paths of what counts as output, as for :func:`weldnet.capture`.

    Raises:
        ModelError: the forward pass itself fails on this input.
        UsageError: it has no such output.
        CaptureError: the forward pass runs, but cannot be exported.
    """
    args, kwargs = call_arguments(own_inputs(example_input))
    if has_weights(model):
        # A model that fails without being exported is a different error. It runs on a copy of its own: some models keep
        # tensors of their first pass.
        call(own_copy(model), None, example_input)
        twin = own_copy(model)
    else:
        twin = own_copy(model, weightless=True)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    state, aliases = named_tensors(twin)
    try:
        answer = _Outputs(twin, outputs)
        program = _export(answer, args, kwargs)
        reader = _Reader(program, state, aliases)
        tensors = reader.read()
    except WeldnetError:
        raise
    except Exception as error:
        raise CaptureError(_why(model, error)) from error
    chosen = outputs_that_count(answer.found.visible, tensors, reader.operations, len(state))
    operations = [reader.operations[i] for i in live(reader.operations, list(chosen.values()))]
    return Trace(
        tensors=reader.tensors,
        aliases=aliases,
        operations=tuple(operations),
        outputs=tuple(chosen.values()),
        selected=tuple(chosen) if len(chosen) < len(answer.found.every) else (),
        constants=reader.constants(operations),
        known=reader.known(),
    )


@dataclass
class _Found:
    """What a model returned, by key path; a class of its own, because export puts back what it can look into."""

    every: Sequence[Output] = ()
    visible: Sequence[Output] = ()


class _Outputs(nn.Module):
    """Answers with the list of a model's output tensors: ``torch.export`` knows few other types."""

    def __init__(self, model: nn.Module, outputs: str | Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self._outputs = outputs
        self.found = _Found()

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        every = find_outputs(self.model(*args, **kwargs))
        visible = visible_outputs(self.model, every, self._outputs)
        self.found.every, self.found.visible = ([replace(o, value=None) for o in found] for found in (every, visible))
        return [output.value for output in visible]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), plain_kernels(model), _quiet():
        program = torch.export.export(model.eval(), args, kwargs, strict=False)
        return program.run_decompositions(_decompositions())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch prints on the way to an error (the graph so far), and warnings about its own future."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _decompositions() -> dict[Any, Any]:
    """Return how to decompose to core ATen, without what would hide what a rule can see as a whole."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd  # pyright: ignore[reportPrivateUsage]
    table: dict[Any, Any] = dict(torch.export.default_decompositions().items())
    return {
        op: how
        for op, how in table.items()
        if op.has_kernel_for_dispatch_key(composite) or not knows(str(op.overloadpacket))
    }


class _Reader:
    """Reads an exported program node by node; every tensor gets a number."""

    def __init__(self, program: ExportedProgram, state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self._program = program
        self._aliases = aliases
        self._count = itertools.count()
        self.tensors = {name: self._ref(tensor) for name, tensor in state.items()}
        self.operations: list[Operation] = []
        self._constants: dict[int, Tensor] = {}
        self._steady = {self.tensors[name].number: t for name, t in state.items() if has_values(t) and not _floats(t)}

    def read(self) -> list[Ref]:
        """Read all operations; return the outputs."""
        signature, graph = self._program.graph_signature, self._program.graph_module
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        inputs = {
            node: self._input(node, spec.kind, spec.target)
            for node, spec in zip(given, signature.input_specs, strict=True)
        }
        found = self._graph(graph, inputs)
        pairs = zip(found, signature.output_specs, strict=True)
        return [value for value, spec in pairs if spec.kind is OutputKind.USER_OUTPUT]

    def constants(self, operations: Sequence[Operation]) -> tuple[Tensor, ...]:
        """Return the tensors that operations use although no operation made them, except weights and inputs."""
        used = dict.fromkeys(ref.number for op in operations for ref in op.inputs)
        return tuple(self._constants[number] for number in used if number in self._constants)

    def known(self) -> dict[int, Tensor]:
        """Return the values of the integer and boolean tensors that depend on neither parameters nor inputs."""
        return {number: tensor for number, tensor in self._steady.items() if not _floats(tensor)}

    def _ref(self, tensor: Tensor) -> Ref:
        shape, strides = (tuple(int(n) for n in sizes) for sizes in (tensor.shape, tensor.stride()))
        return Ref(next(self._count), shape, tensor.dtype, strides, int(tensor.storage_offset()))

    def _input(self, node: fx.Node, kind: InputKind, target: str | None) -> Any:
        """Number a placeholder: tied parameters may come in under any of their names."""
        if kind is not InputKind.USER_INPUT and target is not None:
            name = target.removeprefix("model.")
            name = self._aliases.get(name, name)
            if name in self.tensors:
                return self.tensors[name]
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        ref = self._ref(value)
        constant = self._program.constants.get(target) if target is not None else None
        if isinstance(constant, Tensor):
            self._keep(ref, constant)
        return ref

    def _graph(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Sequence[Any]:
        """Read one graph into the list of operations; return what its output node holds."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node] = self._attribute(module, node)
            elif node.op == "call_function":
                values[node] = self._call(node, *fx.map_arg((node.args, node.kwargs), values.__getitem__))
            elif node.op == "output":
                (result,) = fx.map_arg(node.args, values.__getitem__)
                return result if isinstance(result, list | tuple) else [result]
        raise AssertionError("a graph without an output node")

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        value = operator.attrgetter(str(node.target))(module)
        if not isinstance(value, Tensor):
            return value
        ref = self._ref(value)
        self._keep(ref, value)
        return ref

    def _keep(self, ref: Ref, constant: Tensor) -> None:
        self._constants[ref.number] = constant
        if has_values(constant):
            self._steady[ref.number] = constant

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if isinstance(target, HigherOrderOperator):
            if target.name() == "with_effects":  # an operation that must not be dropped, such as an assertion
                return self._operation(args[1], args[2:], kwargs, node.meta.get("val"))
            return self._region(target, args)
        if not isinstance(target, OpOverload):  # arithmetic on sizes
            return node.meta.get("val")
        return self._operation(target, args, kwargs, node.meta.get("val"))

    def _operation(self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        result = pytree.tree_map_only(Tensor, self._ref, value)
        if str(target.overloadpacket) in _QUESTIONS:
            return result
        _refuse_symbols(target, (args, kwargs))
        outputs = tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Ref))
        args, kwargs = pytree.tree_map(off_meta, (tuple(args), dict(kwargs)))
        operation = Operation(target, args, kwargs, outputs)
        if operation.inputs or outputs:
            self.operations.append(operation)
            self._compute(operation, result)
        return result

    def _compute(self, operation: Operation, result: Any) -> None:
        """Run an operation on constants for real: look-ups need to know where they look."""
        func, arguments = operation.func, (operation.args, operation.kwargs)
        steady = all(ref.number in self._steady for ref in operation.inputs) and not _has_symbols(arguments)
        if not steady or torch.Tag.nondeterministic_seeded in func.tags:
            return
        args, kwargs = pytree.tree_map_only(Ref, lambda ref: self._steady[ref.number], arguments)
        values = func(*args, **kwargs)
        for ref, value in zip(pytree.tree_leaves(result), pytree.tree_leaves(values), strict=True):
            if isinstance(ref, Ref):
                self._steady[ref.number] = value

    def _region(self, target: Any, args: tuple[Any, ...]) -> Sequence[Any]:
        bodies = [i for i, arg in enumerate(args) if isinstance(arg, fx.GraphModule)]
        if target.name() not in _REGIONS or len(bodies) != 1:
            raise CaptureError(
                f"the exported graph contains {target.name()!r}, whose branches or loops weldnet cannot read; "
                "write that step as plain tensor code"
            )
        body, operands = args[bodies[0]], args[bodies[0] + 1 :]
        given = [node for node in body.graph.nodes if node.op == "placeholder"]
        return self._graph(body, dict(zip(given, operands, strict=True)))


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _refuse_symbols(target: Any, arguments: Any) -> None:
    """A number computed from data has no value here: only operations that look at no number's value may take it."""
    if torch.Tag.pointwise not in target.tags and _has_symbols(arguments):
        raise CaptureError(
            f"the exported graph gives {target.overloadpacket} a number that depends on data; "
            "make it a constant, or trace with route='dispatch'"
        )


def _has_symbols(arguments: Any) -> bool:
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(isinstance(leaf, symbols) for leaf in pytree.tree_leaves(arguments))


def _why(model: nn.Module, error: Exception) -> str:
    name = type(model).__name__
    if any("DataDependent" in cls.__name__ for cls in type(error).__mro__):
        return (
            f"{name} cannot be exported: a branch or a size depends on data{_place(error)} ({_first(error)}); "
            "make it plain tensor code (torch.where), or trace with route='dispatch'"
        )
    return (
        f"{name} cannot be exported: {one_line(error)}; make this step plain tensor code, pass the submodule around "
        "it, or trace with route='dispatch'"
    )


def _first(error: BaseException) -> str:
    """Return what an error says before it goes on to talk of torch's own insides."""
    return one_line(error).partition(" (unhinted")[0].partition(". ")[0]


def _place(error: BaseException) -> str:
    """Name the last line of the model's own code on the way to an error."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in _frames(error) if not frame[0].startswith(inside)]
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""


def _frames(error: BaseException) -> Iterator[tuple[str, int]]:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame.f_code.co_filename, step.tb_lineno
        step = step.tb_next
