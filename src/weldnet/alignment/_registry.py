"""The methods by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from weldnet.alignment._auto import choose_auto, have_one_width
from weldnet.alignment._method import AlignmentMethod
from weldnet.alignment._rough import Rough
from weldnet.alignment.activation_matching import ActivationMatching
from weldnet.alignment.frank_wolfe import FrankWolfe
from weldnet.alignment.gamf import Gamf
from weldnet.alignment.identity import Identity
from weldnet.alignment.matched_averaging import MatchedAveraging
from weldnet.alignment.merge_many import MergeMany
from weldnet.alignment.optimal_transport import OptimalTransport
from weldnet.alignment.sinkhorn_rebasin import SinkhornRebasin
from weldnet.alignment.straight_through import StraightThrough
from weldnet.alignment.weight_matching import WeightMatching
from weldnet.errors import UsageError

__all__ = ["METHODS", "describe", "make_method", "require_device", "resolve"]

METHODS: dict[str, type[AlignmentMethod]] = {
    "identity": Identity,
    "weight_matching": WeightMatching,
    "merge_many": MergeMany,
    "gamf": Gamf,
    "frank_wolfe": FrankWolfe,
    "activation_matching": ActivationMatching,
    "optimal_transport": OptimalTransport,
    "straight_through": StraightThrough,
    "matched_averaging": MatchedAveraging,
    "sinkhorn_rebasin": SinkhornRebasin,
}


def resolve(
    method: str | AlignmentMethod, *, has_data: bool, states: Iterable[Mapping[str, Tensor]], **options: Any
) -> tuple[AlignmentMethod, str]:
    """Return a method by name with options, or the method itself; for ``auto`` also why it is that one.

    Args:
        method: a name or a method.
        has_data: whether there are unlabelled inputs, which decides what ``auto`` is.
        states: of the networks; whether their widths differ decides too.
        options: of the method, if it is given by name; they go before those of ``auto``.

    Raises:
        UsageError: as `make_method`.
    """
    if method != "auto":
        return make_method(method, **options), ""
    choice = choose_auto(has_data=has_data, one_width=have_one_width(states))
    return make_method(choice.method, **{**choice.options, **options}), f"auto: {choice.reason}"


def make_method(method: str | AlignmentMethod, **options: Any) -> AlignmentMethod:
    """Return a method by name with options, or the method itself; ``auto`` as it is for equal
    widths and without data.

    Raises:
        UsageError: an unknown name or option; the message lists the known ones.
    """
    if not isinstance(method, str):
        if isinstance(method, type) or not isinstance(method, AlignmentMethod):
            raise UsageError(f"method is {method!r}; give a name ({', '.join(METHODS)}) or an object such as Gamf()")
        if options:
            raise UsageError(f"options {sorted(options)} go with a method's name, not with {method!r}")
        return method
    method = choose_auto(has_data=False).method if method == "auto" else method
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(f"unknown method {method!r}{hint}; weldnet has {', '.join(METHODS)}")
    kind = METHODS[method]
    known = {f.name: f.default for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UsageError(f"{method} has no option {option!r}{hint}; it has {', '.join(known) or 'none'}")
        wanted = (int, float) if isinstance(known[option], float) else type(known[option])
        if isinstance(value, bool) != isinstance(known[option], bool) or not isinstance(value, wanted):
            kind_of = type(known[option]).__name__
            raise UsageError(f"{method}: {option} is {value!r}, a {type(value).__name__}; give a {kind_of}")
    return kind(**options)


def require_device(method: AlignmentMethod, device: torch.device | None) -> None:
    """Refuse a device that a method cannot compute on, before there is anything to compute; None is the CPU.

    Raises:
        UsageError: a precision that the device has not.
    """
    if isinstance(method, Gamf):
        Rough.of(method.precision, device or torch.device("cpu"))


def describe(method: AlignmentMethod) -> str:
    """Return a method's name with the options that differ from their defaults: ``gamf sigma=4.0``."""
    if not dataclasses.is_dataclass(method):
        return method.name
    changed = [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in dataclasses.fields(method)
        if getattr(method, f.name) != f.default
    ]
    return " ".join([method.name, *changed])
