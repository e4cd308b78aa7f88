"""From ``--method``, ``--option`` and ``--device`` to what they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weldnet.errors import UsageError

if TYPE_CHECKING:
    from weldnet.alignment import AlignmentMethod

__all__ = ["check_device", "choose_method"]

_KINDS = {"int": (int, "a whole number"), "float": ((int, float), "a number"), "str": (str, "a word")}


def choose_method(name: str, options: Mapping[str, Any]) -> AlignmentMethod:
    """Return the method of that name with its options.

    Raises:
        UsageError: an unknown name or option, or a value of the wrong type or out of range.
    """
    from weldnet.alignment import METHODS, make_method

    fields = dataclasses.fields(METHODS[name]) if name in METHODS else ()  # pyright: ignore[reportArgumentType]
    for field in fields:
        kind, words = _KINDS.get(str(field.type), (object, ""))
        if field.name in options and not isinstance(options[field.name], kind):
            raise UsageError(f"{name}: option {field.name!r} is {options[field.name]!r}; give {words}")
    return make_method(name, **options)


def check_device(device: str | None) -> None:
    """Raise UsageError for a device that is not here."""
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}; give cpu, or leave it out") from error
