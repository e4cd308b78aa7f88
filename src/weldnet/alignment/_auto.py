"""Which method ``auto`` stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, final

from torch import Tensor

__all__ = ["AUTO", "Choice", "Situation", "choose_auto", "have_one_width"]

#: What decides: whether there are unlabelled inputs, and whether all networks have the same widths.
Situation = Literal["without data", "with data", "other widths"]


@final
@dataclass(frozen=True)
class Choice:
    """What ``auto`` stands for.

    Args:
        method: a name of ``METHODS``.
        reason: why, in the report's words.
        options: of the method, where they are not its defaults.
    """

    method: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


#: By situation. This table is the only place that decides it.
AUTO: dict[Situation, Choice] = {
    "without data": Choice(
        "gamf", "best permutations without data on validation networks, docs/results/auto-choice.md"
    ),
    "with data": Choice(
        "gamf",
        "best permutations with unlabelled inputs on validation networks, docs/results/auto-choice.md",
        MappingProxyType({"activations": 1.0}),
    ),
    "other widths": Choice("optimal_transport", "the widths differ, and it is the method that takes other widths"),
}


def choose_auto(*, has_data: bool, one_width: bool = True) -> Choice:
    """Return what ``auto`` stands for.

    Args:
        has_data: whether there are unlabelled inputs.
        one_width: whether all networks have the same widths.

    >>> choose_auto(has_data=False).method
    'gamf'
    >>> choose_auto(has_data=False, one_width=False).method
    'optimal_transport'
    """
    if not one_width:
        return AUTO["other widths"]
    return AUTO["with data" if has_data else "without data"]


def have_one_width(states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether the tensors that all networks have are of one shape."""
    first, *others = states
    return all(tensor.shape == first[name].shape for s in others for name, tensor in s.items() if name in first)
