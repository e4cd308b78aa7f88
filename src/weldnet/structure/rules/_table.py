"""Which ATen operation belongs to which rule family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from weldnet.structure._trace import Operation, Ref, decompose, offsets
from weldnet.structure._units import Value, broadcast, combine, move_data
from weldnet.structure.rules import (
    _contraction,
    _lookup,
    _movement,
    _normalisation,
    _ordered,
    _reduction,
    _several,
    _window,
)
from weldnet.structure.rules._context import Context, Rule

__all__ = ["FAMILIES", "apply", "knows", "rule_of"]


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


def randomised(context: Context, op: Operation) -> list[Value]:
    """Combine with random numbers, which are drawn position by position."""
    operands = [context.value(ref) for ref in op.inputs]
    return [combine(context.units, [*operands, Value(r.shape, why="random numbers")], r.shape) for r in op.outputs]


def copied(context: Context, op: Operation) -> list[Value]:
    """Write the second operand over the first."""
    return [replace(broadcast(context.value(op.inputs[1]), op.outputs[0].shape), leaf=None)]


def unknown(context: Context, op: Operation) -> list[Value]:
    """Freeze exactly the axes that reach an operation without a rule, and name it."""
    reason = f"no rule for {op.name}"
    reached = [factor for ref in op.inputs for factor in context.value(ref).factors]
    if reached:
        context.unknown[op.name] = context.unknown.get(op.name, 0) + 1
    for factor in reached:
        context.units.pin(factor.units, reason)
    return [Value(ref.shape, why=reason) for ref in op.outputs]


def _family(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


#: Operations that torch does not tag as pointwise although they are.
_POINTWISE = """clone _to_copy where masked_fill fill lift_fresh_copy
    _prelu_kernel hardswish floor_divide"""

_CONSTANT = """zeros zero ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_like zeros_like
    ones_like full_like empty_strided new_empty_strided"""

_SOURCE = "arange eye linspace rand randn randint tril_indices triu_indices"

_RESHAPED = "view _unsafe_view reshape squeeze unsqueeze flatten unflatten view_copy _reshape_alias"

_ALONG_ONE_AXIS = """slice select split split_with_sizes chunk unbind flip roll narrow slice_scatter select_scatter
    unsafe_split unsafe_chunk unsafe_split_with_sizes"""

_MOVEMENT = """cat stack constant_pad_nd repeat unfold pixel_shuffle pixel_unshuffle diagonal channel_shuffle
    native_channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d im2col"""

_ORDERED = """cumsum cumprod logcumsumexp cummax cummin sort argsort topk kthvalue median nanmedian mode argmax argmin
    _fft_r2c _fft_c2c _fft_c2r"""

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
    **_family(randomised, "bernoulli dropout native_dropout"),
    **_family(copied, "copy"),
    **_family(_several.gated, "glu"),
    **_family(_several.weight_norm, "_weight_norm_interface _weight_norm"),
    **_family(_several.trilinear, "_trilinear"),
    **_family(_several.distance, "_cdist_forward _euclidean_dist"),
    **_family(_several.complex_pair, "view_as_complex"),
    **_family(_several.real_pair, "view_as_real"),
    **_family(_movement.identity, "alias detach lift_fresh"),
    **_family(_movement.permuted, "permute transpose t movedim permute_copy t_copy transpose_copy"),
    **_family(_movement.reshaped, _RESHAPED),
    **_family(_movement.expanded, "expand"),
    **_family(_movement.along_one_axis, _ALONG_ONE_AXIS),
    **_family(_movement.movement, _MOVEMENT),
    **_family(_reduction.reduction, _REDUCTION),
    **_family(_reduction.counted, "histc"),
    **_family(_reduction.softmax, "_softmax _log_softmax _safe_softmax softmax log_softmax"),
    **_family(_contraction.matrix_product, "mm bmm mv dot addmm baddbmm addmv matmul linear"),
    **_family(_contraction.grouped_product, "_grouped_mm"),
    "transformers.grouped_mm_fallback": _contraction.grouped_product,  # the same, written by that library
    **_family(_contraction.convolution, "convolution _convolution"),
    **_family(_normalisation.batch_norm, _BATCH_NORM),
    **_family(_normalisation.layer_norm, "native_layer_norm layer_norm"),
    **_family(_normalisation.group_norm, "native_group_norm group_norm"),
    **_family(_window.window, _WINDOW),
    **_family(_movement.restrided, "as_strided"),
    **_family(_lookup.embedding, "embedding"),
    **_family(_lookup.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    **_family(_lookup.index, "index"),
    **_family(_lookup.index_put, "index_put"),
    **_family(_lookup.index_select, "index_select"),
    **_family(_lookup.gather, "gather"),
    **_family(_ordered.ordered, _ORDERED),
    **_family(_ordered.triangular, "tril triu"),
}


def knows(name: str) -> bool:
    """Whether there is a rule for an operation, such as ``aten.add``, besides that for all pointwise ones."""
    return name in FAMILIES


def apply(context: Context, op: Operation) -> None:
    """Push the units through one operation."""
    rule = rule_of(op)
    _follow_rows(context, op, rule)
    values = None if rule is None else rule(context, op)
    if values is None:
        parts = decompose(op, context.fresh_numbers) if rule is None else None
        if parts is not None and all(rule_of(part) is not None for part in parts):
            for part in parts:
                apply(context, part)
            return
        values = unknown(context, op)
    for ref, value in zip(op.outputs, values, strict=True):
        context.values[ref.number] = value
    for ref in op.changed:
        context.values[ref.number] = _overwritten(context, ref, op.outputs[0])


#: Operations along one axis: rows stay rows if it is another one.
_BESIDE_ROWS = {"aten.split", "aten.split_with_sizes", "aten.slice", "aten.chunk", "aten.glu"}


def _follow_rows(context: Context, op: Operation, rule: Rule | None) -> None:
    """Rows that were given to the matrices of a stack stay so only in steps that take each row by itself."""
    given = {ref.number: context.routed[ref.number] for ref in op.inputs if ref.number in context.routed}
    if not given or rule is _contraction.grouped_product:
        return
    rank = len(op.inputs[0].shape)
    beside = op.name in _BESIDE_ROWS and all(d % rank for d in _movement.dims(op))
    rowwise = rule is pointwise and all(len(ref.shape) == 2 for ref in op.outputs)
    if (beside or rowwise) and len(set(given.values())) == 1 and not op.changed:
        context.routed.update((ref.number, next(iter(given.values()))) for ref in op.outputs)
        return
    for ref in op.inputs:
        if ref.number in context.routed:
            _contraction.close_rows(context, ref)


def rule_of(op: Operation) -> Rule | None:
    """Return the rule for an operation, if there is one."""
    # A number taken out of a tensor, a branch on one, and bits read as another type are beyond all rules.
    if not op.outputs or str(op.func) == "aten.view.dtype":
        return None
    known = FAMILIES.get(op.name)
    return known or (pointwise if torch.Tag.pointwise in op.func.tags else None)


def _overwritten(context: Context, ref: Ref, written: Ref) -> Value:
    """What a tensor is after something was written to memory that it shares."""
    own, new = offsets(ref), offsets(written)
    sources = np.arange(own.size).reshape(own.shape)
    order = np.argsort(new.ravel())
    place = np.searchsorted(new.ravel(), own, sorter=order).clip(max=max(new.size - 1, 0))
    hit = new.ravel()[order][place] == own
    sources = np.where(hit, own.size + order[place], sources)
    return move_data(context.units, [context.value(ref), context.value(written)], sources)
