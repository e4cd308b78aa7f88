"""Data movement: run the real operation on numbered elements and look every unit up at its source."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weldnet.structure._trace import Operation, Ref
from weldnet.structure._units import Value, move_data
from weldnet.structure.rules._context import Context

__all__ = ["identity", "movement", "reshape"]


def identity(context: Context, op: Operation) -> list[Value]:
    """Pass the value on unchanged; it still is the parameter that it was."""
    return [context.value(op.inputs[0])]


def movement(context: Context, op: Operation) -> list[Value]:
    """Move data: no shape logic at all, the operation itself says where every element comes from."""
    operands = [context.value(ref) for ref in op.inputs]
    grown = sum(int(np.prod(ref.shape)) for ref in op.outputs) > sum(int(np.prod(v.shape)) for v in operands)
    if not grown and not any(v.factors or v.uniform for v in operands):
        return [Value(ref.shape, why=operands[0].why if operands else Value(()).why) for ref in op.outputs]
    start = 1  # 0 is what the operation fills in by itself
    numbered: dict[int, Tensor] = {}
    for i, ref in enumerate(op.inputs):
        size = int(np.prod(ref.shape, dtype=np.int64))
        numbered[i] = torch.arange(start, start + size, dtype=torch.float64).reshape(ref.shape)
        start += size
    count = iter(range(len(op.inputs)))

    def stand_in(leaf: Any) -> Any:
        return numbered[next(count)] if isinstance(leaf, Ref) else leaf

    args, kwargs = pytree.tree_map(stand_in, (op.args, op.kwargs))
    kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype")}
    if op.name == "aten.constant_pad_nd" and len(args) > 2:
        args = (*args[:2], 0)
    results = [leaf for leaf in pytree.tree_leaves(op.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    return [move_data(context.units, operands, r.to(torch.int64).numpy() - 1) for r in results]


def reshape(context: Context, value: Value, shape: tuple[int, ...]) -> Value:
    """View a value with another shape."""
    sources = np.arange(int(np.prod(value.shape, dtype=np.int64))).reshape(shape)
    return move_data(context.units, [value], sources)
