"""Looking values up by number: embeddings and indexing.

Numbers that are known while tracing (tables of relative positions, constant orders) make a look-up plain data movement.
Numbers that come with the input fix the axis that they count along: nothing renumbers the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Factor, Ints, Value, combine, move_data
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._contraction import fixed_across
from weldnet.structure.rules._movement import joined, restricted, run

__all__ = ["embedding", "embedding_bag", "gather", "index", "index_put", "index_select"]

#: Numbers of these types say which positions to take, not where they are.
MASKS = (torch.bool, torch.uint8)

LOOKED_UP = "looked up by numbers that come with the input"


def embedding(context: Context, op: Operation) -> list[Value]:
    """Take rows of a table."""
    table, numbers = op.inputs[:2]
    return [_along(context, context.value(table), 0, numbers)]


def embedding_bag(context: Context, op: Operation) -> list[Value]:
    """Sum, average or take the largest of rows of a table, bag by bag."""
    kept = fixed_across(context, context.value(op.inputs[0]), {0}, LOOKED_UP)
    return [Value(op.outputs[0].shape, kept), *(Value(ref.shape) for ref in op.outputs[1:])]


def index_select(context: Context, op: Operation) -> list[Value]:
    """Take positions of one axis."""
    value, axis = context.value(op.args[0]), int(op.args[1])
    return [_along(context, value, axis % max(len(value.shape), 1), op.args[2])]


def index(context: Context, op: Operation) -> list[Value]:
    """Take ``x[i, :, j, ...]``: axes with numbers are looked up, the rest pass."""
    value = context.value(op.args[0])
    picks: dict[int, Ref] = {axis: ref for axis, ref in enumerate(op.args[1]) if ref is not None}
    if all(ref.number in context.known for ref in picks.values()):
        (axis, ref), *more = picks.items()
        if not more and ref.dtype not in MASKS:
            return [_along(context, value, axis, ref)]
        return run(context, op, [value], {ref.number for ref in picks.values()})
    return [_by_input(context, value, picks, op.outputs[0].shape)]


def index_put(context: Context, op: Operation) -> list[Value] | None:
    """Write values to known places; other places belong to no rule."""
    target, picked, written, *adds = op.args
    picks = [ref for ref in picked if ref is not None]
    if any(adds) or not all(ref.number in context.known for ref in picks):
        return None
    operands = [context.value(target), context.value(written)]
    return run(context, op, operands, {ref.number for ref in picks})


def gather(context: Context, op: Operation) -> list[Value]:
    """Take one element for each number along ``dim``."""
    args: tuple[Any, ...] = op.args
    source, axis, numbers = args[0], int(args[1]), args[2]
    value, picks = context.value(source), context.value(numbers)
    if numbers.number in context.known:
        return run(context, op, [value], {numbers.number})
    fixed = {axis % max(len(value.shape), 1)} | {a for a, n in enumerate(value.shape) if n != picks.shape[a]}
    kept = fixed_across(context, value, fixed, LOOKED_UP)
    passed = Value(picks.shape, kept, value.uniform - fixed, why=value.why)
    return [combine(context.units, [passed, picks], picks.shape)]


def _along(context: Context, value: Value, axis: int, numbers: Ref) -> Value:
    """Look up along one axis; the numbers' own axes take its place."""
    known = context.known.get(numbers.number)
    if known is not None:
        return _moved(context, value, axis, known.cpu().numpy().astype(np.int64) % value.shape[axis])
    shape = (*value.shape[:axis], *numbers.shape, *value.shape[axis + 1 :])
    return _by_input(context, value, {axis: numbers}, shape)


def _moved(context: Context, value: Value, axis: int, numbers: Ints) -> Value:
    shape = (*value.shape[:axis], *numbers.shape, *value.shape[axis + 1 :])
    if joined({axis}, value) != {axis}:
        elements = np.arange(int(np.prod(value.shape, dtype=np.int64))).reshape(value.shape)
        return move_data(context.units, [value], np.take(elements, numbers, axis))
    found = move_data(context.units, [restricted(value, [axis])], numbers)
    front = Value(numbers.shape, found.factors, found.uniform, why=value.why)
    return _with_others(value, axis, front, shape)


def _with_others(value: Value, axis: int, front: Value, shape: tuple[int, ...]) -> Value:
    """Put what an axis became in its place among the others."""
    longer = len(front.shape) - 1
    place = {a: a if a < axis else a + longer for a in range(len(value.shape)) if a != axis}
    factors = [f.moved([place[a] for a in f.axes]) for f in value.factors if axis not in f.axes]
    factors += [f.moved([axis + a for a in f.axes]) for f in front.factors]
    uniform = {place[a] for a in value.uniform if a != axis} | {axis + a for a in front.uniform}
    return Value(shape, tuple(factors), frozenset(a for a in uniform if shape[a] > 1), why=value.why)


def _by_input(context: Context, value: Value, picks: dict[int, Ref], shape: tuple[int, ...]) -> Value:
    """Look up by unknown numbers: the axes that they count along are fixed, their own axes come in."""
    axes = sorted(picks)
    numbers = [context.value(picks[a]) for a in axes]
    rank = max(len(v.shape) for v in numbers)
    steady = all(value.shape[a] == 1 or a in value.uniform for a in axes)
    kept = fixed_across(context, value, set(axes), LOOKED_UP)
    if any(ref.dtype in MASKS for ref in picks.values()):
        return Value(shape, _pinned(context, kept, "chosen by a mask that is computed"))
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    start = axes[0] if adjacent else 0
    rest = [a for a in range(len(value.shape)) if a not in axes]
    place = {a: (i if i < start else i + rank) for i, a in enumerate(rest)}
    own = Value(
        shape,
        tuple(f.moved([place[a] for a in f.axes]) for f in kept),
        frozenset(
            {place[a] for a in value.uniform if a in place} | (set(range(start, start + rank)) if steady else set())
        ),
        why=value.why,
    )
    after = len(shape) - start - rank
    return combine(context.units, [own, *(_followed(v, after) for v in numbers)], shape)


def _followed(value: Value, axes: int) -> Value:
    """Add axes of size 1 at the end."""
    return Value((*value.shape, *[1] * axes), value.factors, value.uniform, why=value.why)


def _pinned(context: Context, factors: Sequence[Factor], reason: str) -> tuple[Factor, ...]:
    for factor in factors:
        context.units.pin(factor.units, reason)
    return ()
