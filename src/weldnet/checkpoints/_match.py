"""Do the networks fit each other and the model? Are their numbers numbers?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weldnet._modules import forget_cached
from weldnet.checkpoints._text import listing, plural
from weldnet.errors import CheckpointError

__all__ = ["load_into", "match_keys", "match_model", "match_states", "validate_finite"]


def validate_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Refuse a network with NaN or infinite values.

    Args:
        state: tensors of any shape by key; integer and boolean ones are always finite.
        name: the network's or file's name, for the message.

    Raises:
        CheckpointError: naming the network, its first such tensor and how many of its values are not finite.
    """
    bad = [key for key, tensor in state.items() if not bool(_finite(tensor).all())]
    if not bad:
        return
    finite = _finite(state[bad[0]])
    count = finite.numel() - int(finite.sum())
    more = f" (and {plural(len(bad) - 1, 'more tensor')})" if len(bad) > 1 else ""
    raise CheckpointError(
        f"{name!r}: {count} of {plural(finite.numel(), 'value')} of {listing(bad[:1])}{more} "
        f"{'is' if count == 1 else 'are'} NaN or infinite; use a checkpoint from before the training diverged"
    )


def match_keys(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Require that all networks have the same keys, whatever their widths.

    Args:
        states: state dicts by network name; each is compared with the first.

    Raises:
        CheckpointError: naming the first network that differs, and the keys.
    """
    names = list(states)
    for name in names[1:]:
        _compare_keys(list(states[name]), list(states[names[0]]), repr(name), repr(names[0]))


def match_states(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Require that all networks have the same keys and shapes. Dtypes and devices may differ.

    Args:
        states: state dicts by network name; each is compared with the first.

    Raises:
        CheckpointError: naming the first network that differs, the keys, and both shapes.
    """
    match_keys(states)
    names = list(states)
    for name in names[1:]:
        _compare_shapes(states[name], states[names[0]], repr(name), repr(names[0]))


def match_model(state: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Require that a state dict fits a model: the same keys, shapes and kinds (floating, complex, integer).

    Whole numbers in a floating tensor fit an integer one: who halves a checkpoint often halves its counters too.

    Of tensors that are tied in the model one is enough (many files leave the others out); where the state
    has several, they must be equal.

    Args:
        state: tensors by key.
        model: its parameters and persistent buffers are what is expected; it is not changed.
        name: the network's or file's name, for the message.

    Raises:
        CheckpointError: naming the keys and both shapes.
    """
    expected = _tensors(model)
    groups = _tied(expected)
    wanted = [key for key in expected if key in state or not any(other in state for other in groups[key])]
    _compare_keys(list(state), wanted, repr(name), "the model")
    present = {key: expected[key] for key in wanted}
    _compare_shapes(state, present, repr(name), "the model")
    _compare_kinds(state, present, name)
    _compare_tied(state, groups, name)


def whole_kinds(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, torch.dtype]:
    """Return the types that a model gives to what is floating in a state and integer in the model, by key."""
    kinds = {key: tensor.dtype for key, tensor in _tensors(model).items() if _kind(tensor) == "integer"}
    return {key: kinds[key] for key, tensor in state.items() if key in kinds and tensor.is_floating_point()}


def load_into(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy a state dict into a model, strictly, after `match_model`; a model that does not fit is unchanged.

    The model takes the state's dtypes for floating-point tensors, so that a bfloat16 or float64 checkpoint
    keeps its precision. It keeps its device, its tied tensors and its ``requires_grad`` flags; nothing is
    shared with the state.

    Args:
        model: changed in place.
        state: tensors by key.
        name: the network's or file's name, for the message.

    Raises:
        CheckpointError: as `match_model`.
    """
    match_model(state, model, name)
    for key, target in _tensors(model).items():
        if key in state:
            _overwrite(target, state[key])
    forget_cached(model)


def tied_keys(model: nn.Module) -> dict[str, list[str]]:
    """Return for every key of a model the keys of the same tensor, itself among them."""
    return _tied(_tensors(model))


def _overwrite(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if target.is_floating_point() and target.dtype != value.dtype:
            # Through .data the object stays the same, so tied tensors stay tied.
            target.data = target.data.to(value.dtype)
            target.grad = None
        target.copy_(value)


def _finite(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return torch.isfinite(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    lazy = [key for key, value in state.items() if is_lazy(value)]
    if lazy:
        raise CheckpointError(f"the model's {listing(lazy)} not initialised; run it once on an example input")
    return state


def _tied(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(id(tensor), []).append(key)
    return {key: groups[id(tensor)] for key, tensor in state.items()}


def _compare_keys(have: list[str], wanted: list[str], name: str, other: str) -> None:
    have_set, wanted_set = set(have), set(wanted)
    missing = [key for key in wanted if key not in have_set]
    extra = [key for key in have if key not in wanted_set]
    if not missing and not extra:
        return
    common = len(wanted) - len(missing)
    if 2 * common < max(len(have), len(wanted)):
        raise CheckpointError(
            f"{name} and {other} are different architectures: {common} keys in common of {len(have)} and "
            f"{len(wanted)} ({name} has {listing(extra, 2) or 'no others'}; {other} has "
            f"{listing(missing, 2) or 'no others'}); give networks of the same model"
        )
    parts = [f"lacks {plural(len(missing), 'key')} of {other} ({listing(missing)})"] if missing else []
    parts += [f"has {plural(len(extra), 'key')} that {other} lacks ({listing(extra)})"] if extra else []
    raise CheckpointError(f"{name} {' and '.join(parts)}; give networks of the same model")


def _compare_shapes(state: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str, reference: str) -> None:
    bad = [key for key, tensor in other.items() if state[key].shape != tensor.shape]
    if not bad:
        return
    pairs = [(key, tuple(state[key].shape), tuple(other[key].shape)) for key in bad[:2]]
    shown = ", ".join(f"{listing([key])} is {a} in {name} but {b} in {reference}" for key, a, b in pairs)
    more = f" and {plural(len(bad) - 2, 'more tensor')}" if len(bad) > 2 else ""
    raise CheckpointError(
        f"{plural(len(bad), 'tensor')} of another shape: {shown}{more}; give networks of the same size"
    )


def _compare_kinds(state: Mapping[str, Tensor], model: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in model.items():
        if _kind(state[key]) != _kind(tensor) and not (_kind(tensor) == "integer" and _is_whole(state[key])):
            raise CheckpointError(
                f"{name!r}: {listing([key])} is {state[key].dtype} but {tensor.dtype} in the model; "
                "convert it where the checkpoint is made"
            )


def _is_whole(tensor: Tensor) -> bool:
    """Whether a floating tensor holds whole numbers only; nobody knows of one without values."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return False
    values = tensor.double()
    return bool((values.isfinite() & (values == values.round())).all())


def _kind(tensor: Tensor) -> str:
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _compare_tied(state: Mapping[str, Tensor], groups: Mapping[str, list[str]], name: str) -> None:
    for key, group in groups.items():
        first = next(other for other in group if other in state)
        if key in state and key != first and not _same(state[key], state[first]):
            raise CheckpointError(
                f"{name!r}: {listing([first, key])} differ, but are one tensor in the model; "
                "use a model that does not tie them"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
