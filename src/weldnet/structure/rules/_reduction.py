"""Reductions that treat all indices alike, and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Value, combine, reduce
from weldnet.structure.rules._context import Context

__all__ = ["counted", "reduction", "softmax", "without_axes"]


def reduction(context: Context, op: Operation) -> list[Value]:
    """Reduce over the axes that the schema calls ``dim``, or over all of them."""
    if len(op.inputs) > 1:  # max(a, b) and min(a, b) are pointwise
        operands = [context.value(ref) for ref in op.inputs]
        return [combine(context.units, operands, ref.shape) for ref in op.outputs]
    value = context.value(op.inputs[0])
    axes = _axes(_argument(op, "dim"), len(value.shape))
    if op.name in ("aten.max", "aten.min") and len(op.outputs) == 2 and op.outputs[1].number in context.used:
        for factor in value.factors:
            if set(factor.axes) & set(axes):
                context.units.pin(factor.units, f"its number is used (the indices of {op.name})")
    reduced = reduce(context.units, value, axes)
    keep = all(len(ref.shape) == len(value.shape) for ref in op.outputs)
    result = reduced if keep else without_axes(reduced, axes)
    return [result for _ in op.outputs]


def counted(context: Context, op: Operation) -> list[Value]:
    """Count values, whichever unit they belong to; the counts have an order of their own."""
    value = context.value(op.inputs[0])
    reduce(context.units, value, range(len(value.shape)))
    return [Value(ref.shape, why=value.why) for ref in op.outputs]


def softmax(context: Context, op: Operation) -> list[Value]:
    """Combine the values with their own sum along one axis."""
    value = context.value(op.inputs[0])
    total = reduce(context.units, value, _axes(_argument(op, "dim"), len(value.shape)))
    return [combine(context.units, [value, total], value.shape)]


def without_axes(value: Value, axes: Sequence[int]) -> Value:
    """Drop axes of size 1."""
    keep = [a for a in range(len(value.shape)) if a not in axes]
    number = {a: i for i, a in enumerate(keep)}
    return Value(
        tuple(value.shape[a] for a in keep),
        tuple(Factor(tuple(number[a] for a in f.axes), f.units, f.tags) for f in value.factors),
        frozenset(number[a] for a in value.uniform if a in number),
        why=value.why,
    )


def _argument(op: Operation, name: str) -> Any:
    for i, argument in enumerate(op.func._schema.arguments):
        if argument.name == name:
            return op.args[i] if i < len(op.args) else op.kwargs.get(name, argument.default_value)
    return None


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    dims = [dim] if isinstance(dim, int) else [d for d in dim if not isinstance(d, Ref)]
    return [d % rank if rank else d for d in dims]
