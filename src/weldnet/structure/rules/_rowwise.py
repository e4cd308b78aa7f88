"""Weights of grouped convolutions that are computed from parameters, row by row.

What an input index of a grouped weight means depends on the group. A weight that is a parameter itself is opened (see
``_contraction``); one that is computed (standardised, normed, masked) no longer shows whose axes it has. Where every
row of it comes from the same row of the parameters, whatever the order in that row, it may be read as if it were those
parameters: that is found out beforehand, on units of their own in which every row has its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from weldnet.structure._forest import read_forest
from weldnet.structure._trace import Operation, Ref, Trace
from weldnet.structure._units import Factor, Value
from weldnet.structure.rules._context import Context

__all__ = ["KERNEL", "open_rowwise"]

KERNEL = "kernel position"

_CONVOLUTIONS = frozenset({"aten.convolution", "aten._convolution"})

Apply = Callable[[Context, Operation], None]


@dataclass(frozen=True)
class _Computed:
    """The weight of a grouped convolution: the operations that make it, and the parameters of its shape."""

    convolution: Operation
    operations: tuple[Operation, ...]
    names: tuple[str, ...]

    @property
    def weight(self) -> Ref:
        return self.convolution.inputs[1]

    @property
    def groups(self) -> int:
        return int(self.convolution.args[8])


def open_rowwise(context: Context, traced: Trace, leaves: Mapping[str, Value], apply: Apply) -> None:
    """Find the computed weights of grouped convolutions that can be read row by row, and note them in the context.

    The parameters that they come from lose their input axis in what rules see: it is opened where the convolution is.

    Args:
        context: before any operation was applied.
        traced: the operations.
        leaves: the values of the parameters.
        apply: pushes units through one operation.
    """
    answers: dict[str, bool] = {}  # a network makes many weights in the same way
    found: list[_Computed] = []
    for computed in _computed(traced):
        recipe = _recipe(context, traced, computed)
        if recipe not in answers:
            answers[recipe] = _is_rowwise(context, traced, computed, apply)
        if answers[recipe]:
            found.append(computed)
    for computed in _alone(traced, found):
        context.rowwise[computed.weight.number] = tuple(leaves[name] for name in computed.names)
        for name in computed.names:
            leaf = leaves[name]
            rows = tuple(f for f in leaf.factors if f.axes == (0,))
            context.values[traced.tensors[name].number] = Value(leaf.shape, rows, why=KERNEL)
            for factor in leaf.factors:
                if factor.axes[0] > 1:
                    context.units.pin(factor.units, KERNEL)


def _computed(traced: Trace) -> list[_Computed]:
    makers = {ref.number: (i, op) for i, op in enumerate(traced.operations) for ref in op.outputs}
    names = {ref.number: name for name, ref in traced.tensors.items()}
    found: list[_Computed] = []
    for op in traced.operations:
        if op.name not in _CONVOLUTIONS or int(op.args[8]) == 1 or op.inputs[1].number not in makers:
            continue
        weight = op.inputs[1]
        steps: dict[int, Operation] = {}
        sources: list[str] = []
        waiting = [weight.number]
        while waiting:
            number = waiting.pop()
            if number in names:
                sources.append(names[number])
            elif number in makers and makers[number][0] not in steps:
                i, step = makers[number]
                steps[i] = step
                waiting += [ref.number for ref in step.inputs]
        kernels = tuple(n for n in dict.fromkeys(sources) if traced.tensors[n].shape == weight.shape)
        in_place = any(step.changed for step in steps.values())
        if kernels and weight.shape[1] > 1 and not in_place:
            found.append(_Computed(op, tuple(steps[i] for i in sorted(steps)), kernels))
    return found


def _recipe(context: Context, traced: Trace, computed: _Computed) -> str:
    """Write down all that decides what the operations do to units, with tensors numbered as they come."""
    names = {ref.number: name for name, ref in traced.tensors.items()}
    numbers: dict[int, int] = {}

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        local = numbers.setdefault(leaf.number, len(numbers))
        kernel = names.get(leaf.number) in computed.names
        known = leaf.number if leaf.number in context.known else None
        return f"t{local}", leaf.shape, str(leaf.dtype), leaf.number in names, kernel, known

    steps = [
        (str(op.func), pytree.tree_map_only(object, describe, (op.args, op.kwargs, op.outputs)))
        for op in (*computed.operations, computed.convolution)
    ]
    return repr(steps)


def _is_rowwise(context: Context, traced: Trace, computed: _Computed, apply: Apply) -> bool:
    """Whether what is in a row stays in it, at its place, and may be put in any order there."""
    trial = Context(context.shapes, known=context.known, used=context.used)
    rows, columns = computed.weight.shape[:2]
    opened: list[np.ndarray] = []
    needed = {ref.number for op in computed.operations for ref in op.inputs}
    for name, ref in traced.tensors.items():
        shape = ref.shape
        if name in computed.names:
            opened.append(trial.units.fresh(rows, columns))
            trial.values[ref.number] = Value(shape, (Factor((0, 1), opened[-1]),), why=KERNEL)
        elif ref.number in needed and (ref.dtype.is_floating_point or ref.dtype.is_complex):
            axes = [axis for axis, size in enumerate(shape) if size > 1]
            trial.values[ref.number] = Value(shape, tuple(Factor((a,), trial.units.fresh(shape[a])) for a in axes))
    for op in computed.operations:
        apply(trial, op)
    units, result = trial.units, trial.value(computed.weight)
    ends = [f for f in result.factors if f.axes == (0, 1) and f.tags is None]
    if not ends or trial.unknown:
        return False
    end = units.find(ends[0].units)
    if any(not np.array_equal(units.find(each), end) for each in opened):
        return False
    forest = read_forest(units)
    bundles = np.unique(forest.bundle_of[end])
    if len(bundles) != 1 or bundles[0] < 0 or len(np.unique(forest.class_of[end])) != 1:
        return False
    bundle = forest.bundles[int(bundles[0])]
    if bundle.size != rows * columns:
        return False
    if bundle.parent is None:
        return True
    # Blocks are contiguous: they must be the rows.
    blocks = forest.index_of[end] // columns
    whole = forest.bundles[bundle.parent].size == rows
    return whole and bool((blocks == blocks[:, :1]).all())


def _alone(traced: Trace, found: list[_Computed]) -> list[_Computed]:
    """Leave out weights of which something is used in any other way, or with other groups."""
    outputs = {ref.number for ref in traced.outputs}
    while True:
        steps = {id(op) for computed in found for op in computed.operations}
        ends = {id(computed.convolution): computed.weight.number for computed in found}
        groups: dict[str, set[int]] = {}
        for computed in found:
            for name in computed.names:
                groups.setdefault(name, set()).add(computed.groups)

        def is_alone(computed: _Computed) -> bool:
            depends = {traced.tensors[name].number for name in computed.names}
            for op in computed.operations:
                if depends & {ref.number for ref in op.inputs}:
                    depends |= {ref.number for ref in op.outputs}
            for op in traced.operations:
                used = [i for i, ref in enumerate(op.inputs) if ref.number in depends]
                if used and id(op) not in steps and (used != [1] or ends.get(id(op)) != op.inputs[1].number):  # noqa: B023
                    return False
            return not depends & outputs and all(len(groups[name]) == 1 for name in computed.names)  # noqa: B023

        kept = [computed for computed in found if is_alone(computed)]
        if len(kept) == len(found):
            return kept
        found = kept
