"""Norms: a value combined with statistics of itself and with its affine parameters."""

from __future__ import annotations

from weldnet.structure._trace import Operation
from weldnet.structure._units import Factor, Value, combine, reduce
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._movement import reshape

__all__ = ["batch_norm", "group_norm", "layer_norm"]


def batch_norm(context: Context, op: Operation) -> list[Value]:
    """Combine channels with weight, bias and running statistics (all lie on axis 1)."""
    x, *stats = (context.value(ref) for ref in op.inputs)
    spread = [_on_axis(v, 1, len(x.shape)) for v in stats]
    over = [a for a in range(len(x.shape)) if a != 1]
    mean = reduce(context.units, x, over)  # in training mode the statistics come from the batch itself
    return _with_statistics(op, combine(context.units, [x, mean, *spread], x.shape))


def layer_norm(context: Context, op: Operation) -> list[Value]:
    """Combine with the mean and deviation over the last axes, then with weight and bias."""
    x, *affine = (context.value(ref) for ref in op.inputs)
    over = range(len(x.shape) - len(op.args[1]), len(x.shape))
    normal = combine(context.units, [x, reduce(context.units, x, over)], x.shape)
    return _with_statistics(op, combine(context.units, [normal, *affine], x.shape))


def group_norm(context: Context, op: Operation) -> list[Value]:
    """Normalise inside each group of channels: channels move inside groups, and whole groups move."""
    x, *affine = (context.value(ref) for ref in op.inputs)
    groups = next(int(a) for a in reversed(op.args) if isinstance(a, int) and not isinstance(a, bool))
    batch, channels, *rest = x.shape
    grouped = reshape(context, x, (batch, groups, channels // groups, *rest))
    normal = combine(
        context.units, [grouped, reduce(context.units, grouped, range(2, len(grouped.shape)))], grouped.shape
    )
    back = reshape(context, normal, x.shape)
    return _with_statistics(
        op, combine(context.units, [back, *(_on_axis(v, 1, len(x.shape)) for v in affine)], x.shape)
    )


def _on_axis(value: Value, axis: int, rank: int) -> Value:
    """Spread a vector along one axis of a tensor of ``rank`` axes."""
    shape = tuple(value.shape[0] if a == axis else 1 for a in range(rank))
    uniform = frozenset({axis}) if 0 in value.uniform else frozenset[int]()
    return Value(shape, tuple(Factor((axis,), f.units, f.tags) for f in value.factors), uniform, why=value.why)


def _with_statistics(op: Operation, value: Value) -> list[Value]:
    """The further outputs (saved mean and deviation) are used by the backward pass only."""
    return [value, *(Value(ref.shape, why=value.why) for ref in op.outputs[1:])]
