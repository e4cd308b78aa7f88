"""What counts as a network's output: key paths into whatever its forward pass returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weldnet.errors import CaptureError, UsageError

__all__ = [
    "ANSWER",
    "ASIDE",
    "CACHE",
    "LEAVE_OUT",
    "NAME_SOME",
    "Output",
    "find_outputs",
    "output_tensors",
    "refuse_opaque",
    "select_outputs",
]

#: What a returned value is for: the answer; a by-product next to it; the memory of a generation loop.
ANSWER, ASIDE, CACHE = "answer", "aside", "cache"

#: Fields of transformers' outputs that carry what a next call starts from.
_CACHES = frozenset(
    {"past_key_values", "cache_params", "mems", "state", "states", "past_buckets_states", "rnn_state", "conv_state"}
    | {"shared_kv_states"}
)
#: What to do about outputs that were named, and may hide tensors; and about those that count because none was named.
LEAVE_OUT = "leave it out of the outputs that are named"
NAME_SOME = "name the outputs that count (outputs=, --outputs)"
_PLAIN = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.Size


@dataclass(frozen=True)
class Output:
    """One value that a forward pass returns.

    Args:
        path: keys, field names and indices on the way to it, joined by dots; empty if it is all that is returned.
        value: a tensor, or an object of a type that may hide tensors.
        role: ``ANSWER``, ``ASIDE`` or ``CACHE``.
    """

    path: str
    value: Any
    role: str = ANSWER

    def __str__(self) -> str:
        shape = list(self.value.shape) if isinstance(self.value, Tensor) else f" (a {type(self.value).__name__})"
        return f"{self.path}{shape}"


def find_outputs(result: Any) -> list[Output]:
    """Name everything in what a forward pass returns: in tuples, mappings, named tuples and dataclasses of any depth.

    In an output of the transformers library the fields with logits and the loss are the answer. Where there are
    none, every field but the caches is.
    """
    return list(_walk(result, "", ANSWER))


def select_outputs(found: Sequence[Output], names: str | Sequence[str]) -> list[Output]:
    """Return the outputs that ``names`` select; a name selects what lies below it too, no names everything.

    Raises:
        UsageError: a name selects nothing; the message lists what there is.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if not any(_selects(name, output.path) for output in found):
            known = ", ".join(str(output) for output in found[:12]) or "no tensor"
            more = f" and {len(found) - 12} more" if len(found) > 12 else ""
            unnamed = len(found) == 1 and not found[0].path
            way_out = "it has no name: leave outputs out" if unnamed else "choose among these"
            raise UsageError(f"the forward pass returns no output {name!r}; it returns {known}{more}; {way_out}")
    return [output for output in found if not names or any(_selects(name, output.path) for name in names)]


def output_tensors(result: Any, names: str | Sequence[str] | None = None) -> list[Tensor]:
    """Return the tensors that count in what a forward pass returns.

    Args:
        result: what the forward pass returned.
        names: key paths of what counts, as in :class:`~weldnet.structure.Structure`; none of them: everything;
            None: the answer, see :func:`find_outputs`.

    Raises:
        UsageError: a name is unknown.
        CaptureError: what counts is of a type that may hide tensors.
    """
    found = find_outputs(result)
    chosen = [o for o in found if o.role == ANSWER] if names is None else select_outputs(found, names)
    refuse_opaque(chosen, NAME_SOME if names is None else LEAVE_OUT)
    return [output.value for output in chosen]


def refuse_opaque(chosen: Sequence[Output], way_out: str) -> None:
    """Raise CaptureError if an output that counts is of a type that may hide tensors; ``way_out`` ends the message."""
    for output in chosen:
        if not isinstance(output.value, Tensor):
            where = f" as {output.path!r}" if output.path else ""
            raise CaptureError(
                f"the forward pass returns a {type(output.value).__name__}{where}, which may hide tensors; "
                f"return tensors, tuples, dicts or dataclasses, or {way_out}"
            )


def _selects(name: str, path: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _walk(value: Any, path: str, role: str) -> Iterator[Output]:
    if isinstance(value, Tensor):
        yield Output(path, value, role)
    elif not isinstance(value, _PLAIN):
        parts = _parts(value)
        if parts is None:
            yield Output(path, value, role)
            return
        roles = _field_roles(parts) if _is_model_output(value) else {}
        for key, part in parts.items():
            yield from _walk(part, f"{path}.{key}" if path else key, max(role, roles.get(key, ANSWER), key=_rank))


def _parts(value: Any) -> dict[str, Any] | None:
    """Return what a container holds by key, field name or index; None if it is no container that we can look into."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple | list):
        keys = getattr(value, "_fields", None) or range(len(value))
        return {str(key): part for key, part in zip(keys, value, strict=True)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return None
    return {str(index): leaf for index, leaf in enumerate(leaves)}


def _is_model_output(value: Any) -> bool:
    """Whether this is an output of the transformers library, which need not be installed."""
    return any(kind.__name__ == "ModelOutput" and "transformers" in kind.__module__ for kind in type(value).__mro__)


def _field_roles(fields: Mapping[str, Any]) -> dict[str, str]:
    caches = {name for name in fields if name in _CACHES or name.endswith("past_key_values")}
    # How tokens were sent to experts is a by-product, although it is called logits.
    logits = {name for name in fields if "logits" in name and "router_logits" not in name}
    answer = logits | {"loss"} if logits else set(fields) - caches
    return {name: CACHE if name in caches else ANSWER if name in answer else ASIDE for name in fields}


def _rank(role: str) -> int:
    return (ANSWER, ASIDE, CACHE).index(role)
