"""Pooling and interpolation: windows over spatial axes, each channel by itself."""

from __future__ import annotations

import re

from weldnet.structure._trace import Operation
from weldnet.structure._units import Value
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._contraction import fixed_across

__all__ = ["window"]


def window(context: Context, op: Operation) -> list[Value]:
    """Keep what lies on batch and channel axes; pin what a window runs over."""
    value = context.value(op.inputs[0])
    spatial = _spatial_axes(op, len(value.shape))
    kept = fixed_across(context, value, spatial, f"moved by a window of {op.name}")
    uniform = value.uniform - spatial
    return [Value(ref.shape, kept, uniform, why=value.why) for ref in op.outputs]


def _spatial_axes(op: Operation, rank: int) -> set[int]:
    found = re.search(r"([123])d", op.name)
    count = int(found.group(1)) if found else rank - 2
    return set(range(rank - count, rank))
