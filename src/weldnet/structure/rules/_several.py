"""Operations that torch fuses from several steps, each with the steps written out."""

from __future__ import annotations

import numpy as np

from weldnet.structure._trace import Operation
from weldnet.structure._units import Value, combine, move_data, reduce
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._contraction import contract
from weldnet.structure.rules._movement import reshape
from weldnet.structure.rules._reduction import without_axes

__all__ = ["complex_pair", "distance", "gated", "real_pair", "trilinear", "weight_norm"]


def gated(context: Context, op: Operation) -> list[Value]:
    """Combine the two halves of an axis."""
    value, shape = context.value(op.inputs[0]), op.outputs[0].shape
    axis = next(a for a, n in enumerate(value.shape) if n != shape[a])
    elements = np.arange(int(np.prod(value.shape))).reshape(value.shape)
    halves = [move_data(context.units, [value], half) for half in np.split(elements, 2, axis)]
    return [combine(context.units, halves, shape)]


def weight_norm(context: Context, op: Operation) -> list[Value]:
    """Scale a direction, divided by its norm over all axes but ``dim``."""
    direction, scale = (context.value(ref) for ref in op.inputs)
    dim = int(op.args[2]) if len(op.args) > 2 else 0
    norm = reduce(context.units, direction, [a for a in range(len(direction.shape)) if a != dim])
    whole = combine(context.units, [direction, norm, scale], direction.shape)
    return [whole, norm][: len(op.outputs)]


def trilinear(context: Context, op: Operation) -> list[Value]:
    """Multiply three tensors, spread over common axes, and sum over some of them (nn.Bilinear)."""
    spread: list[Value] = []
    for ref, new in zip(op.args[:3], op.args[3:6], strict=True):
        shape = list(ref.shape)
        for axis in sorted(new):
            shape.insert(axis, 1)
        spread.append(reshape(context, context.value(ref), tuple(shape)))
    shape = tuple(max(sizes) for sizes in zip(*(v.shape for v in spread), strict=True))
    product = combine(context.units, spread, shape)
    axes = [int(a) for a in op.args[6]]
    return [without_axes(reduce(context.units, product, axes), axes)]


def distance(context: Context, op: Operation) -> list[Value]:
    """Compare all rows of two matrices; batch axes are alike on both sides."""
    left, right = (context.value(ref) for ref in op.inputs[:2])
    batch = "ABCDEFGH"[: len(op.outputs[0].shape) - 2]
    left, right = (reshape(context, v, (*[1] * (len(batch) + 2 - len(v.shape)), *v.shape)) for v in (left, right))
    return [contract(context, f"{batch}ik,{batch}jk->{batch}ij", left, right)]


def complex_pair(context: Context, op: Operation) -> list[Value]:
    """Read the last axis, of size 2, as real and imaginary part."""
    value = context.value(op.inputs[0])
    last = len(value.shape) - 1
    roles = Value((2,), why="real and imaginary part")
    return [without_axes(reduce(context.units, combine(context.units, [value, roles], value.shape), [last]), [last])]


def real_pair(context: Context, op: Operation) -> list[Value]:
    """Write real and imaginary part along a new last axis."""
    value = context.value(op.inputs[0])
    return [Value(op.outputs[0].shape, value.factors, value.uniform, why=value.why)]
