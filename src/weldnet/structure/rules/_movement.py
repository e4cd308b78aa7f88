"""Data movement: run the real operation on numbered elements and look every unit up at its source.

Numbering every element costs memory, so an operation is first cut down to the axes that it acts on: the other axes
keep their factors. What only renames or regroups axes needs no numbers at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Value, broadcast, move_data
from weldnet.structure.rules._context import Context

__all__ = [
    "along_one_axis",
    "dims",
    "expanded",
    "identity",
    "joined",
    "movement",
    "permuted",
    "reshape",
    "reshaped",
    "restricted",
    "restrided",
    "run",
]


def identity(context: Context, op: Operation) -> list[Value]:
    """Pass the value on unchanged; it still is the parameter that it was."""
    return [context.value(op.inputs[0])]


def permuted(context: Context, op: Operation) -> list[Value]:
    """Rename axes (permute, transpose, movedim)."""
    value, ref = context.value(op.inputs[0]), op.outputs[0]
    probe = op.func(torch.empty(value.shape, device="meta"), *op.args[1:], **op.kwargs)
    strides = torch.empty(value.shape, device="meta").stride()
    free = list(range(len(value.shape)))
    order: list[int] = []
    for size, stride in zip(ref.shape, probe.stride(), strict=True):
        order.append(next(a for a in free if value.shape[a] == size and strides[a] == stride))
        free.remove(order[-1])
    place = {axis: i for i, axis in enumerate(order)}
    return [_renamed(value, place, ref.shape)]


def reshaped(context: Context, op: Operation) -> list[Value]:
    """Regroup axes in their order (view, reshape, flatten, squeeze, unsqueeze)."""
    return [reshape(context, context.value(op.inputs[0]), op.outputs[0].shape)]


def expanded(context: Context, op: Operation) -> list[Value]:
    """Stretch axes of size 1; along them the result is the same everywhere."""
    return [broadcast(context.value(op.inputs[0]), op.outputs[0].shape)]


def along_one_axis(context: Context, op: Operation) -> list[Value]:
    """Move data along ``dim`` only (slice, select, split, flip, ...): the other axes pass."""
    if len(op.inputs) > 1:
        return movement(context, op)
    value = context.value(op.inputs[0])
    along = [d % len(value.shape) for d in dims(op) if value.shape]
    active = joined(set(along), value) if along else set(range(len(value.shape)))
    if len(active) == len(value.shape):
        return movement(context, op)
    passive = [a for a in range(len(value.shape)) if a not in active]
    small = Value(
        tuple(1 if a in passive else n for a, n in enumerate(value.shape)),
        tuple(f for f in value.factors if f.axes[0] in active),
        value.uniform & active,
        why=value.why,
    )
    results = run(context, op, [small])
    return [_with_passive(value, passive, along, r, ref.shape) for r, ref in zip(results, op.outputs, strict=True)]


def movement(context: Context, op: Operation) -> list[Value]:
    """Move data: no shape logic at all, the operation itself says where every element comes from."""
    operands = [context.value(ref) for ref in op.inputs]
    grown = sum(int(np.prod(ref.shape)) for ref in op.outputs) > sum(int(np.prod(v.shape)) for v in operands)
    if not grown and not any(v.factors or v.uniform for v in operands):
        return [Value(ref.shape, why=operands[0].why if operands else Value(()).why) for ref in op.outputs]
    return run(context, op, operands)


def restrided(context: Context, op: Operation) -> list[Value] | None:
    """Leave a tensor as it is (as_strided with the strides that it has anyway, as pooling does)."""
    given, ref = op.inputs[0], op.outputs[0]
    axes = [a for a, n in enumerate(given.shape) if n > 1]
    same = given.shape == ref.shape and given.offset == ref.offset
    if same and all(given.strides[a] == ref.strides[a] for a in axes):
        return [context.value(given)]
    return None


def reshape(context: Context, value: Value, shape: tuple[int, ...]) -> Value:
    """View a value with another shape."""
    parts = _groups(value.shape, shape)
    for factor in value.factors:  # a factor that reaches over several groups keeps them together
        parts = _gathered(parts, lambda ins, _, axes=factor.axes: bool(set(axes) & set(ins)))
    factors: list[Factor] = []
    uniform: set[int] = set()
    for ins, outs in parts:
        here = restricted(value, ins)
        if len(ins) == len(outs) == 1:
            moved = here
        else:
            size = int(np.prod(here.shape, dtype=np.int64))
            sources = np.arange(size).reshape([shape[a] for a in outs])
            moved = move_data(context.units, [here], sources) if here.factors else _regrouped(here, sources.shape)
        factors += [f.moved([outs[a] for a in f.axes]) for f in moved.factors]
        uniform |= {outs[a] for a in moved.uniform}
    return Value(shape, tuple(factors), frozenset(uniform), why=value.why)


# -- cutting an operation down -----------------------------------------------------------------------


def _renamed(value: Value, place: dict[int, int], shape: tuple[int, ...]) -> Value:
    factors = tuple(f.moved([place[a] for a in f.axes]) for f in value.factors)
    leaf = value.leaf and (value.leaf[0], tuple(value.leaf[1][a] for a in sorted(place, key=lambda a: place[a])))
    uniform = frozenset(place[a] for a in value.uniform)
    return replace(value, shape=shape, factors=factors, uniform=uniform, leaf=leaf)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of axes of two shapes that hold the same elements; axes of size 1 are left out."""
    ins = [a for a, n in enumerate(old) if n != 1]
    outs = [a for a, n in enumerate(new) if n != 1]
    if 0 in old:
        return []
    groups: list[tuple[list[int], list[int]]] = []
    while ins:
        left, right = [ins.pop(0)], [outs.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(ins.pop(0))
                a *= old[left[-1]]
            else:
                right.append(outs.pop(0))
                b *= new[right[-1]]
        groups.append((left, right))
    return groups


def _gathered(
    groups: list[tuple[list[int], list[int]]], chosen: Callable[[list[int], list[int]], bool]
) -> list[tuple[list[int], list[int]]]:
    """Make one group of those chosen."""
    together = [g for g in groups if chosen(*g)]
    if len(together) < 2:
        return groups
    one = ([a for ins, _ in together for a in ins], [a for _, outs in together for a in outs])
    return [*(g for g in groups if not chosen(*g)), one]


def restricted(value: Value, axes: Sequence[int]) -> Value:
    """Keep some axes, and the factors that lie on them."""
    number = {a: i for i, a in enumerate(axes)}
    factors = tuple(f.moved([number[a] for a in f.axes]) for f in value.factors if f.axes[0] in number)
    uniform = frozenset(number[a] for a in value.uniform if a in number)
    return Value(tuple(value.shape[a] for a in axes), factors, uniform, why=value.why)


def _regrouped(value: Value, shape: tuple[int, ...]) -> Value:
    """View a value without factors: what varies along any old axis may vary along every new one."""
    if all(n == 1 or a in value.uniform for a, n in enumerate(value.shape)):
        return Value(shape, uniform=frozenset(a for a, n in enumerate(shape) if n > 1), why=value.why)
    steady = [n for a, n in enumerate(value.shape) if a not in value.uniform]
    if len(steady) == len(value.shape):
        return Value(shape, why=value.why)
    index = np.unravel_index(np.arange(int(np.prod(shape))).reshape(shape), value.shape)
    moving = [i for a, i in enumerate(index) if a not in value.uniform]
    uniform = frozenset(
        a for a, n in enumerate(shape) if n > 1 and not any((i != i.take([0], axis=a)).any() for i in moving)
    )
    return Value(shape, uniform=uniform, why=value.why)


def dims(op: Operation) -> list[int]:
    """The axes that an operation acts on; empty means all."""
    for i, argument in enumerate(op.func._schema.arguments):
        if argument.name in ("dim", "dims", "dimension"):
            found = op.args[i] if i < len(op.args) else op.kwargs.get(argument.name, argument.default_value)
            return [found] if isinstance(found, int) else list(found or ())
    return []


def joined(axes: set[int], value: Value) -> set[int]:
    """Add the axes that share a factor with some of these."""
    while True:
        more = axes.union(*(f.axes for f in value.factors if axes & set(f.axes)))
        if more == axes:
            return axes
        axes = more


def _with_passive(
    value: Value, passive: Sequence[int], along: Sequence[int], small: Value, shape: tuple[int, ...]
) -> Value:
    """Put the passive axes back where a cut-down operation left axes of size 1."""
    gone = set(along) if len(shape) < len(value.shape) else set[int]()
    kept = [a for a in range(len(value.shape)) if a not in gone]
    place = {a: kept.index(a) for a in passive}
    factors = tuple(f.moved([place[a] for a in f.axes]) for f in value.factors if f.axes[0] in place)
    uniform = frozenset(place[a] for a in value.uniform if a in place)
    return Value(shape, (*factors, *small.factors), small.uniform | uniform, why=small.why)


def run(context: Context, op: Operation, operands: Sequence[Value], constants: Container[int] = ()) -> list[Value]:
    """Run the operation on numbered elements of these operands in place of its inputs.

    Inputs whose numbers are in ``constants`` are no operands: the operation gets their known values.
    """
    starts = itertools.accumulate([int(np.prod(v.shape, dtype=np.int64)) for v in operands], initial=1)
    numbered = [  # 0 is what the operation fills in by itself
        torch.arange(start, start + int(np.prod(v.shape, dtype=np.int64)), dtype=torch.float64).reshape(v.shape)
        for start, v in zip(starts, operands, strict=False)
    ]
    count = iter(numbered)

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        return context.known[leaf.number].cpu() if leaf.number in constants else next(count)

    args, kwargs = pytree.tree_map(stand_in, (op.args, op.kwargs))
    kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype")}
    if op.name == "aten.constant_pad_nd" and len(args) > 2:
        args = (*args[:2], 0)
    results = [leaf for leaf in pytree.tree_leaves(op.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    return [move_data(context.units, operands, r.to(torch.int64).numpy() - 1) for r in results]
