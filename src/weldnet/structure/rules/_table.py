"""Which ATen operation belongs to which rule family."""

from __future__ import annotations

import numpy as np
import torch

from weldnet.structure._trace import Operation
from weldnet.structure._units import Value, combine, move_data
from weldnet.structure.rules import _contraction, _movement, _normalisation, _reduction, _window
from weldnet.structure.rules._context import Context, Rule

__all__ = ["FAMILIES", "apply"]


def pointwise(context: Context, op: Operation) -> list[Value]:
    """Combine all operands index by index; every output has the same units."""
    operands = [context.value(ref) for ref in op.inputs]
    return [combine(context.units, operands, ref.shape) for ref in op.outputs]


def constant(context: Context, op: Operation) -> list[Value]:
    """Make tensors that are the same everywhere, whatever went in (zeros, ones, full, empty)."""
    return [Value(r.shape, uniform=frozenset(a for a, n in enumerate(r.shape) if n > 1)) for r in op.outputs]


def source(context: Context, op: Operation) -> list[Value]:
    """Make tensors whose indices mean positions (arange, eye, random numbers)."""
    return [Value(r.shape, why=f"indices made by {op.name}") for r in op.outputs]


def unknown(context: Context, op: Operation) -> list[Value]:
    """Freeze exactly the axes that reach an operation without a rule, and name it."""
    reason = f"no rule for {op.name}"
    reached = [factor for ref in op.inputs for factor in context.value(ref).factors]
    if reached or op.outputs:
        context.unknown[op.name] = context.unknown.get(op.name, 0) + 1
    for factor in reached:
        context.units.pin(factor.units, reason)
    return [Value(ref.shape, why=reason) for ref in op.outputs]


def gated(context: Context, op: Operation) -> list[Value]:
    """Combine the two halves of an axis."""
    value, shape = context.value(op.inputs[0]), op.outputs[0].shape
    axis = next(a for a, n in enumerate(value.shape) if n != shape[a])
    elements = np.arange(int(np.prod(value.shape))).reshape(value.shape)
    halves = [move_data(context.units, [value], half) for half in np.split(elements, 2, axis)]
    return [combine(context.units, halves, shape)]


def _family(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


#: Operations that torch does not tag as pointwise although they are.
_POINTWISE = """clone _to_copy where masked_fill copy fill bernoulli dropout native_dropout lift_fresh_copy
    _prelu_kernel hardswish"""

_CONSTANT = """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_like zeros_like
    ones_like full_like empty_strided new_empty_strided"""

_SOURCE = "arange eye linspace rand randn randint tril_indices triu_indices"

_MOVEMENT = """view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice select split
    split_with_sizes chunk cat stack unbind constant_pad_nd flip roll repeat unfold pixel_shuffle pixel_unshuffle
    slice_scatter select_scatter diagonal movedim channel_shuffle native_channel_shuffle narrow flatten
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d view_copy t_copy permute_copy"""

_REDUCTION = "sum mean amax amin max min prod var std var_mean std_mean any all logsumexp norm linalg_vector_norm"

_BATCH_NORM = """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    batch_norm"""

_WINDOW = """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool3d max_pool1d
    max_pool2d max_pool3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa"""

FAMILIES: dict[str, Rule] = {
    **_family(pointwise, _POINTWISE),
    **_family(constant, _CONSTANT),
    **_family(source, _SOURCE),
    **_family(gated, "glu"),
    **_family(_movement.identity, "alias detach lift_fresh"),
    **_family(_movement.movement, _MOVEMENT),
    **_family(_reduction.reduction, _REDUCTION),
    **_family(_reduction.softmax, "_softmax _log_softmax _safe_softmax softmax log_softmax"),
    **_family(_contraction.matrix_product, "mm bmm mv dot addmm baddbmm addmv matmul linear"),
    **_family(_contraction.convolution, "convolution _convolution"),
    **_family(_normalisation.batch_norm, _BATCH_NORM),
    **_family(_normalisation.layer_norm, "native_layer_norm layer_norm"),
    **_family(_normalisation.group_norm, "native_group_norm group_norm"),
    **_family(_window.window, _WINDOW),
}


def apply(context: Context, op: Operation) -> None:
    """Push the units through one operation."""
    # What is written through a view changes other tensors too: no rule covers that.
    # A number taken out of a tensor, or a branch on one, is beyond all rules too.
    hidden = not op.outputs or str(op.func) == "aten.view.dtype"
    rule = unknown if hidden or (op.func._schema.is_mutable and len(op.outputs) > 1) else FAMILIES.get(op.name)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in op.func.tags else unknown
    for ref, value in zip(op.outputs, rule(context, op), strict=True):
        context.values[ref.number] = value
