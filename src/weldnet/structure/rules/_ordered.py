"""Operations for which the order along an axis matters: running sums, sorting, Fourier transforms, triangles."""

from __future__ import annotations

from weldnet.structure._trace import Operation
from weldnet.structure._units import Value, combine
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._contraction import fixed_across
from weldnet.structure.rules._movement import dims

__all__ = ["ordered", "triangular"]


def ordered(context: Context, op: Operation) -> list[Value]:
    """Fix the positions along ``dim``; what lies on other axes passes."""
    value, rank = context.value(op.inputs[0]), len(op.inputs[0].shape)
    axes = {d % rank for d in dims(op)} or set(range(rank))
    kept = fixed_across(context, value, axes, f"the order matters to {op.name}")
    results: list[Value] = []
    for ref in op.outputs:
        gone = axes if len(ref.shape) < rank else set[int]()
        left = [a for a in range(rank) if a not in gone]
        place = {a: i for i, a in enumerate(left)}
        factors = tuple(f.moved([place[a] for a in f.axes]) for f in kept)
        uniform = frozenset(place[a] for a in value.uniform - axes)
        results.append(Value(ref.shape, factors, uniform, why=value.why))
    return results


def triangular(context: Context, op: Operation) -> list[Value]:
    """Fix the positions along the last two axes, where what is cut off depends on both."""
    value, shape = context.value(op.inputs[0]), op.outputs[0].shape
    triangle = Value(shape[-2:], why=f"the order matters to {op.name}")
    return [combine(context.units, [value, triangle], shape)]
