"""Contractions: place both sides on common axes, combine, reduce. Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Value, combine, join_factors, reduce
from weldnet.structure.rules._context import Context, Opened
from weldnet.structure.rules._movement import reshape
from weldnet.structure.rules._reduction import without_axes
from weldnet.structure.rules._rowwise import KERNEL

__all__ = ["close_rows", "contract", "convolution", "fixed_across", "grouped_product", "matrix_product"]

#: Names for batch axes, which an ellipsis in a formula stands for.
_BATCH = "ABCDEFGH"


def contract(context: Context, formula: str, *operands: Value) -> Value:
    """Push units through an einsum: ``"bc,oc->bo"``."""
    left, out = formula.split("->")
    inputs = left.split(",")
    sizes: dict[str, int] = {}
    for letters, value in zip(inputs, operands, strict=True):
        for letter, size in zip(letters, value.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    summed = [letter for letter in sizes if letter not in out]
    order = [*out, *summed]
    shape = tuple(sizes[letter] for letter in order)
    placed = [_place(v, letters, order) for letters, v in zip(inputs, operands, strict=True)]
    full = combine(context.units, placed, shape)
    gone = list(range(len(out), len(order)))
    context.summed += [f.units for value in placed for f in value.factors if set(f.axes) & set(gone)]
    return without_axes(reduce(context.units, full, gone), gone)


def matrix_product(context: Context, op: Operation) -> list[Value]:
    """mm, bmm, mv, dot, linear, and the same with an addend."""
    name = op.name.removeprefix("aten.")
    operands = [context.value(ref) for ref in op.inputs]
    addend = [operands.pop(0)] if name in ("addmm", "baddbmm", "addmv") else []
    if name == "linear":
        addend = operands[2:]
    a, b = (_open_stack(context, value) for value in operands[:2])
    rank_a, rank_b = len(a.shape), len(b.shape)
    batch = _BATCH[: max(rank_a, 0 if name == "linear" else rank_b, 2) - 2]
    left = (batch[len(batch) - max(rank_a - 2, 0) :] + "i" if rank_a > 1 else "") + "k"
    right = batch[len(batch) - max(rank_b - 2, 0) :] + ("ko" if rank_b > 1 else "k")
    right = "ok" if name == "linear" else right
    out = batch + ("i" if rank_a > 1 else "") + ("o" if rank_b > 1 else "")
    product = contract(context, f"{left},{right}->{out}", a, b)
    if addend:
        product = combine(context.units, [*addend, product], op.outputs[0].shape)
    return [product]


def grouped_product(context: Context, op: Operation) -> list[Value] | None:
    """Multiply runs of rows each with a matrix of its own from a stack (mixtures of experts).

    Which rows a matrix gets comes with the input, so the matrices keep their numbers; but what happens to a row is the
    same whichever it gets. So rows are given out evenly here, as long as they stay the rows that they are: the table of
    rules closes rows (`close_rows`) that anything but a step row by row takes up.
    """
    if len(op.inputs) < 3 or op.inputs[:3] != list(op.args[:3]):
        return None
    x, stack, ends = op.inputs[:3]
    if len(x.shape) != 2 or len(stack.shape) != 3:
        return None
    units, (rows, matrices) = context.units, (x.shape[0], stack.shape[0])
    if context.routed.get(x.number) != ends.number:
        close_rows(context, x)
    context.routed[op.outputs[0].number] = ends.number
    chosen = np.arange(rows) * matrices // max(rows, matrices)
    weight = _open_stack(context, context.value(stack))
    factors: list[Factor] = []
    for factor in weight.factors:
        if factor.axes == (0,):
            units.pin(factor.units, "chosen by numbers that come with the input")
        elif 0 in factor.axes:
            copies = np.broadcast_to(np.arange(rows)[:, None], (rows, factor.units.shape[1]))
            factors.append(Factor(factor.axes, factor.units[chosen], copies))
        else:
            factors.append(factor)
    given = Value((rows, *weight.shape[1:]), tuple(factors), weight.uniform - {0}, why=weight.why)
    product = contract(context, "tk,tkn->tn", context.value(x), given)
    bias = [context.value(ref) for ref in op.inputs[3:]]
    return [combine(units, [product, *bias], op.outputs[0].shape)]


def close_rows(context: Context, ref: Ref) -> None:
    """Forget which matrix a row was given to: what is left may depend on the columns only."""
    value = context.value(ref)
    kept = fixed_across(context, value, {0}, "rows given to matrices by numbers that come with the input")
    context.values[ref.number] = Value(value.shape, kept, value.uniform - {0}, why=value.why)
    context.routed.pop(ref.number, None)


def convolution(context: Context, op: Operation) -> list[Value]:
    """Contract channels; windows pin what lies on spatial axes, kernel slots keep their number."""
    x, weight, *bias = (context.value(ref) for ref in op.inputs)
    transposed, groups = bool(op.args[6]), int(op.args[8])
    shape = op.outputs[0].shape
    spatial = len(weight.shape) - 2
    if len(x.shape) == spatial + 1:  # no batch axis
        x = reshape(context, x, (1, *x.shape))
        shape = (1, *shape)
    x = _only(context, x, (0, 1), "moved by a convolution window")
    weight = _only(context, weight, (0, 1), KERNEL)
    if groups == 1:
        product = contract(context, "bc,co->bo" if transposed else "bc,oc->bo", x, weight)
    else:
        kernels = context.rowwise.get(op.inputs[1].number, () if weight.leaf is None else (weight,))
        product = _grouped(context, x, weight, kernels, groups, transposed)
    out = Value(shape, product.factors, product.uniform, why=x.why)
    if bias:
        channel = [a for a in range(len(shape)) if a == 1]
        spread = Value(
            tuple(n if a in channel else 1 for a, n in enumerate(shape)),
            tuple(f.moved(channel) for f in bias[0].factors),
            frozenset(channel) if 0 in bias[0].uniform else frozenset(),
            why=bias[0].why,
        )
        out = combine(context.units, [out, spread], shape)
    if len(op.outputs[0].shape) < len(shape):
        out = reshape(context, out, op.outputs[0].shape)
    return [out]


def _grouped(
    context: Context, x: Value, weight: Value, kernels: Sequence[Value], groups: int, transposed: bool
) -> Value:
    """See channels as (group, i): which input an index of the weight means depends on the group.

    ``kernels`` are the parameters whose input axis the weight has, row by row.
    """
    rows, columns = weight.shape
    x = reshape(context, x, (x.shape[0], groups, x.shape[1] // groups))
    if not kernels or any(k.leaf is None or k.leaf[1][:2] != (0, 1) for k in kernels):
        # Computed: its axes may lie in one factor, or in none.
        seen = reshape(context, weight, (groups, rows // groups, columns))
        product = contract(context, "bgi,gio->bgo" if transposed else "bgi,goi->bgo", x, seen)
        return reshape(context, product, (product.shape[0], product.shape[1] * product.shape[2]))
    row_factors = tuple(f for f in weight.factors if f.axes == (0,))
    outer = reshape(context, Value(weight.shape[:1], row_factors, why=weight.why), (groups, rows // groups))
    inner = [_open(context, kernel, groups, columns) for kernel in kernels]
    first, second = ("gi", "go") if transposed else ("go", "gi")
    product = contract(context, ",".join(["bgi", first, *[second] * len(inner)]) + "->bgo", x, outer, *inner)
    return reshape(context, product, (product.shape[0], product.shape[1] * product.shape[2]))


def _open(context: Context, weight: Value, groups: int, columns: int) -> Value:
    """Give axis 1 of a grouped weight one unit for each (group, index) instead of one for each index."""
    plain = next((f for f in weight.factors if f.axes == (1,)), None)
    if plain is None:  # one channel a group (depthwise): nothing there to renumber
        return Value((groups, columns), uniform=frozenset(a for a, n in ((0, groups), (1, columns)) if n > 1))
    assert weight.leaf is not None
    name, axes = weight.leaf
    opened = context.opened.get((name, axes[1]))
    if opened is None or opened.factor.units.shape != (groups, columns):
        if opened is not None:
            for known in (opened.factor.units, plain.units):
                context.units.pin(known, f"{name} is used with different groups")
        full = context.shapes[name]
        view = (groups, full[0] // groups, *full[1:])
        factor = Factor((0, 2), context.units.fresh(groups, columns))
        opened = Opened(view, factor, plain.units)
        context.opened[name, axes[1]] = opened
    return Value((groups, columns), (Factor((0, 1), opened.factor.units),))


def _open_stack(context: Context, value: Value) -> Value:
    """Give every matrix of a stack that is a parameter units of its own: each is renumbered by itself."""
    if value.leaf is None or len(value.shape) != 3 or value.shape[0] == 1:
        return value
    name, axes = value.leaf
    full = context.shapes[name]
    here = {axis: i for i, axis in enumerate(axes)}
    factors = [f for f in value.factors if f.axes == (0,)]
    for plain in (f for f in value.factors if f.axes != (0,)):
        key = name, axes[plain.axes[0]]
        if key not in context.opened:
            new = context.units.fresh(full[axes[0]], full[key[1]])
            context.opened[key] = Opened(full, Factor((0, 1), new).moved([axes[0], key[1]]), plain.units)
        opened = context.opened[key]
        if opened.view != full or axes[0] not in opened.factor.axes:
            context.units.pin(plain.units, f"{name} is used with different groups")
            return value
        factors.append(opened.factor.moved([here[a] for a in opened.factor.axes]))
    return Value(value.shape, tuple(factors), value.uniform, why=value.why)


def _place(value: Value, letters: str, order: list[str]) -> Value:
    """Put a value on the common axes of a contraction; axes that it lacks have size 1 there."""
    axes = [order.index(letter) for letter in letters]
    shape = [1] * len(order)
    for axis, size in zip(axes, value.shape, strict=True):
        shape[axis] = size
    factors = tuple(f.moved([axes[a] for a in f.axes]) for f in value.factors)
    return Value(tuple(shape), factors, frozenset(axes[a] for a in value.uniform), why=value.why)


def _only(context: Context, value: Value, axes: tuple[int, ...], reason: str) -> Value:
    """Forget all axes but ``axes``; what lies on the others keeps its position there."""
    factors = fixed_across(context, value, set(range(len(value.shape))) - set(axes), reason)
    shape = tuple(value.shape[a] for a in axes)
    return Value(shape, factors, value.uniform & set(axes), value.leaf, value.why)


def fixed_across(context: Context, value: Value, axes: set[int], reason: str) -> tuple[Factor, ...]:
    """Pin positions along ``axes``; of a factor that lies partly on them, whole blocks can still move."""
    kept: list[Factor] = []
    for factor in value.factors:
        if not set(factor.axes) & axes:
            kept.append(factor)
            continue
        slots = Value(tuple(n if a in axes and a in factor.axes else 1 for a, n in enumerate(value.shape)), why=reason)
        held = combine(context.units, [Value(value.shape, (factor,)), slots], value.shape)
        kept += reduce(context.units, Value(value.shape, held.factors), axes).factors
    return join_factors(context.units, kept)
