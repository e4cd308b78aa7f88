"""From ``--method``, ``--option`` and ``--device`` to what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from weldnet.cli._early import check_method, check_options, close
from weldnet.errors import UsageError

if TYPE_CHECKING:
    from weldnet.alignment import AlignmentMethod

__all__ = ["check_device", "choose_method"]

_KINDS = {int: ((int,), "a whole number"), float: ((int, float), "a number"), str: ((str,), "a word")}


def choose_method(name: str, options: Mapping[str, Any], *, has_data: bool = False) -> AlignmentMethod:
    """Return the method of that name with its options; ``auto`` is what it is for equal widths.

    Raises:
        UsageError: an unknown name or option, or a value of the wrong type or out of range; what is allowed is said.
    """
    from weldnet.alignment import METHODS, choose_auto, make_method

    check_method(name)
    if name == "auto":
        choice = choose_auto(has_data=has_data)
        name, options = choice.method, {**choice.options, **options}
    check_options(name, options)
    hints = get_type_hints(METHODS[name])
    for option, value in options.items():
        _check_option(f"{name}: option {option!r}", value, hints[option])
    return make_method(name, **options)


def _check_option(what: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        allowed = [str(word) for word in get_args(hint)]
        if value not in allowed:
            raise UsageError(f"{what} is {value!r}{close(str(value), allowed)}; give {' or '.join(allowed)}")
        return
    kinds, words = _KINDS.get(hint, ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint in _KINDS):
        raise UsageError(f"{what} is {value!r}; give {words}")


def check_device(device: str | None, method: AlignmentMethod | None = None) -> None:
    """Raise UsageError for a device that is not here, or that a method cannot compute on."""
    from weldnet._arrays import find_device
    from weldnet.alignment import require_device

    found = find_device(device)
    if method is not None:
        require_device(method, found)
