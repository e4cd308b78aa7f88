"""Capture: from a model and an example input to its structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weldnet._modules import bare, forget_cached
from weldnet.errors import CaptureError
from weldnet.structure._copies import named_tensors, own_copy
from weldnet.structure._forest import NO_FREEDOM, Forest, read_forest
from weldnet.structure._meta import has_weights
from weldnet.structure._outputs import output_tensors
from weldnet.structure._roles import OUTPUT, Roles
from weldnet.structure._routes import record
from weldnet.structure._spec import Frozen, Indices, Layout, Place, Space, Structure
from weldnet.structure._trace import Ref, Trace, call
from weldnet.structure._units import Factor, Units, Value
from weldnet.structure.rules import apply
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._rowwise import open_rowwise

__all__ = ["capture"]

UNUSED = "not used by the forward pass"
INTEGERS = "integers of the model, which count as constants"


def capture(
    model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None = None, *, route: str = "auto"
) -> Structure:
    """Find out what can be renumbered in a model, from one forward pass.

    The pass is run on a copy in eval mode; every ATen operation then pushes unit numbers from its inputs to its
    outputs. What an operation without a rule touches is frozen and named, so that the result is always sound.

    Args:
        model: any module; not changed. Its parameters may be on the meta device, with shapes and no values.
        example_input: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. Values do
            not matter, shapes and dtypes do.
        outputs: key paths of what counts as output in what the forward pass returns, such as ``"logits"``, ``"1"`` or
            ``"1.hidden"``; a path selects everything below it. If None: everything, except in outputs of the
            transformers library: there logits and loss count if there are any, else every field but the caches; and
            fields that have weights of their own.
        route: how the operations are found. ``"dispatch"`` records a forward pass; ``"export"`` takes the graph of
            ``torch.export``, which is slower; ``"auto"`` is the former and, for a model on the meta device where that
            fails, the latter.

    Returns:
        The structure: spaces, places, frozen axes with reasons.

    Raises:
        UsageError: there is no such route or output, or the model is none, such as a state dict.
        ModelError: the model fails on this input.
        CaptureError: the forward pass cannot be traced, or there is nothing in it.

    Example:
        >>> import torch, weldnet
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> weldnet.capture(net, torch.zeros(1, 4)).spaces
        (Space(name='0', size=8, parent=None, block=0),)
    """
    model = bare(model)
    traced = record(model, example_input, outputs, route)
    if not traced.tensors:
        raise CaptureError(
            f"{type(model).__name__} has no parameters: there is nothing to align; give a trained network"
        )
    context = Context({name: ref.shape for name, ref in traced.tensors.items()})
    leaves = {name: _leaf(context, name, ref) for name, ref in traced.tensors.items()}
    for name, ref in traced.tensors.items():
        context.values[ref.number] = leaves[name]
    _inputs(context, traced)
    context.known = traced.known
    context.used = frozenset(ref.number for op in traced.operations for ref in op.inputs)
    context.used |= frozenset(ref.number for ref in traced.outputs)
    open_rowwise(context, traced, leaves, apply)
    roles = Roles(context, traced)
    for operation in traced.operations:
        apply(context, operation)
        roles.note(operation)
    for ref in traced.outputs:
        for factor in context.value(ref).factors:
            context.units.pin(factor.units, OUTPUT)
    unused = _unused(traced)
    if has_weights(model):  # where there are no values, none can leave torch
        _refuse_hidden_use(model, example_input, traced, unused, route)
    for name in unused:
        for factor in leaves[name].factors:
            context.units.pin(factor.units, UNUSED)
    _settle_opened(context)
    _pin_untouched(context.units)
    found = _structure(context, leaves, read_forest(context.units), roles, traced)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return replace(found, buffers=tuple(dict.fromkeys(p.tensor for p in found.places if p.tensor not in parameters)))


def _unused(traced: Trace) -> list[str]:
    used = {ref.number for op in traced.operations for ref in op.inputs} | {ref.number for ref in traced.outputs}
    return [name for name, ref in traced.tensors.items() if ref.number not in used]


def _refuse_hidden_use(model: nn.Module, example_input: Any, traced: Trace, unused: list[str], route: str) -> None:
    """Nothing may reach the output past the operations: else the forward pass leaves torch on its way.

    That shows in two ways: a tensor that no operation uses changes the output, or a constant depends on parameters.
    """
    twin = own_copy(model)
    state, _ = named_tensors(twin)
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    before: list[Tensor] | None = None
    for name in unused:
        if name in floats:
            before = before or output_tensors(call(twin, None, example_input), traced.selected)
            changed = {**state, name: floats[name] * 1.5 + 0.1}
            forget_cached(twin)
            after = output_tensors(call(twin, changed, example_input), traced.selected)
            if not _equal(before, after):
                raise CaptureError(_leaves_torch(model, f"{name!r} changes the output but reaches no torch operation"))
    if traced.constants:
        forget_cached(twin)
        with torch.no_grad():
            for tensor in floats.values():
                tensor.copy_(tensor.flatten().flip(0).reshape(tensor.shape) * 1.5 + 0.1)
        if not _equal(traced.constants, record(twin, example_input, traced.selected, route).constants):
            raise CaptureError(_leaves_torch(model, "a tensor is computed from its parameters outside of torch"))


def _pin_untouched(units: Units) -> None:
    """Units that nothing has tied are never read on this input, as the rows of a table for longer sequences."""
    roots = units.root
    touched = np.bincount(roots, minlength=len(roots)) > 1
    for members in (*(r.source for r in units.relations), *(r.target for r in units.relations)):
        touched[roots[members]] = True
    units.pin(np.flatnonzero(~touched[roots]), UNUSED)


def _leaves_torch(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__} cannot be traced: {what}; the forward pass leaves torch on its way "
        "(.numpy(), a compiled kernel): make that plain tensor code"
    )


def _equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Equal up to rounding: the same function need not give the same bits twice."""
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(_dense(a), _dense(b), rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )


def _dense(tensor: Tensor) -> Tensor:
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).double()


def _leaf(context: Context, name: str, ref: Ref) -> Value:
    if not (ref.dtype.is_floating_point or ref.dtype.is_complex):
        return Value(ref.shape, why=INTEGERS)
    axes = [axis for axis, size in enumerate(ref.shape) if size > 1]
    factors = tuple(Factor((axis,), context.units.fresh(ref.shape[axis])) for axis in axes)
    return Value(ref.shape, factors, leaf=(name, tuple(range(len(ref.shape)))))


def _inputs(context: Context, traced: Trace) -> None:
    """What is neither a parameter nor made by an operation is an input or a constant: its indices are positions."""
    made = {ref.number for op in traced.operations for ref in op.outputs}
    for op in traced.operations:
        for ref in op.inputs:
            if ref.number not in made and ref.number not in context.values:
                context.values[ref.number] = Value(ref.shape)


def _settle_opened(context: Context) -> None:
    """An axis that depends on another one must not be used in any other way."""
    if not context.opened:
        return
    units = context.units
    roots = units.root
    members = np.bincount(roots, minlength=len(roots))
    touched = np.zeros(len(roots), bool)
    for tied in (
        *(r.source for r in units.relations),
        *(r.target for r in units.relations),
        *(p for p, _ in units.pins),
    ):
        touched[roots[tied]] = True
    for (name, _), opened in context.opened.items():
        plain = roots[opened.replaces]
        if touched[plain].any() or (members[plain] > 1).any():
            for known in (opened.factor.units, opened.replaces):
                units.pin(known, f"{name} is used both in groups and as a whole")


# -- from the forest to places -----------------------------------------------------------------------


def _structure(context: Context, leaves: dict[str, Value], forest: Forest, roles: Roles, traced: Trace) -> Structure:
    found: list[tuple[str, int, int, tuple[int, ...], Layout, tuple[int, ...] | None]] = []
    frozen: list[Frozen] = []
    for name, leaf in leaves.items():
        for factor in leaf.factors:
            axis, view = factor.axes[0], None
            opened = context.opened.get((name, axis))
            if opened is not None:
                factor, view = opened.factor, opened.view
            for bundle, positions in _positions(forest, factor):
                found.append((name, axis, bundle, factor.axes, Layout.of(positions), view))
            frozen += _frozen(context, forest, roles, name, factor, axis)
    names, spaces = _spaces(forest, [(name, bundle) for name, _, bundle, *_ in found])
    places = tuple(
        Place(name, names[bundle], axes, layout, view, roles.of(name, axis))
        for name, axis, bundle, axes, layout, view in found
    )
    return Structure(spaces, places, tuple(frozen), context.shapes, traced.aliases, context.unknown, traced.selected)


def _positions(forest: Forest, factor: Factor) -> list[tuple[int, Indices]]:
    """For every bundle on a factor: the positions of its units, shape (units, copies)."""
    units = factor.units.ravel()
    bundles, classes = forest.bundle_of[units], forest.class_of[units]
    result: list[tuple[int, Indices]] = []
    for bundle in dict.fromkeys(bundles[bundles >= 0].tolist()):
        columns: list[Indices] = []
        for number in dict.fromkeys(classes[bundles == bundle].tolist()):
            here = np.flatnonzero(classes == number)
            column = np.empty(forest.bundles[bundle].size, np.int64)
            column[forest.index_of[units[here]]] = here
            columns.append(column)
        result.append((bundle, np.stack(columns, axis=1)))
    return result


def _frozen(context: Context, forest: Forest, roles: Roles, name: str, factor: Factor, axis: int) -> list[Frozen]:
    units = context.units.find(factor.units.ravel())
    fixed = units[forest.bundle_of[units] < 0]
    counts = Counter(roles.refine(fixed, [forest.reasons.get(unit, NO_FREEDOM) for unit in fixed.tolist()]))
    return [Frozen(name, axis, count, reason) for reason, count in counts.items()]


def _spaces(forest: Forest, found: list[tuple[str, int]]) -> tuple[dict[int, str], tuple[Space, ...]]:
    """Name every bundle that has places, or has a descendant with places, after its first tensor."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    first: dict[int, str] = {}
    for tensor, bundle in found:
        first.setdefault(bundle, tensor)
        up = forest.bundles[bundle].parent
        while up is not None:
            first.setdefault(up, f"{tensor}")
            up = forest.bundles[up].parent
    placed = {bundle for _, bundle in found}
    for bundle, tensor in first.items():
        base = tensor.rpartition(".")[0] or tensor
        base = base if bundle in placed else f"{base}/blocks"
        name, count = base, 2
        while name in taken:
            name, count = f"{base}#{count}", count + 1
        taken.add(name)
        names[bundle] = name
    spaces: list[Space] = []
    for number, bundle in enumerate(forest.bundles):
        if number in names:
            parent = bundle.parent
            block = bundle.size // forest.bundles[parent].size if parent is not None else 0
            spaces.append(Space(names[number], bundle.size, None if parent is None else names[parent], block))
    return names, tuple(spaces)
