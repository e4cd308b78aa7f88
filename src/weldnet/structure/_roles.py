"""Which fixed units are hidden ones: an input's index may not move by nature, a unit that is added to it by wiring."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from weldnet.structure._spec import Role
from weldnet.structure._trace import Operation, Ref, Trace
from weldnet.structure._units import INPUT, Ints
from weldnet.structure.rules._context import Context
from weldnet.structure.rules._lookup import LOOKED_UP

__all__ = ["OUTPUT", "RETURNED", "TIED", "Roles"]

OUTPUT = "network output"
TIED = "tied to network input"
RETURNED = "hidden, but returned as output"

_INPUT_REASONS = frozenset({INPUT, f"joined with {INPUT}", LOOKED_UP})


class Roles:
    """What operations do to the units of parameters: write them into activations, or read them out of them.

    Args:
        context: the values of all tensors, as the rules find them.
        traced: what is walked through.
    """

    def __init__(self, context: Context, traced: Trace) -> None:
        self._context = context
        self._still = {ref.number for ref in traced.tensors.values()} | set(context.known)  # what depends on no input
        self._leaves = {
            ref.number: {name: ref} for name, ref in traced.tensors.items()
        }  # what still tensors are made of
        self._of: dict[tuple[str, int], Role] = {}
        self._written: list[Ints] = []
        self._read: list[Ints] = []
        self._pins = self._summed = 0

    def note(self, op: Operation) -> None:
        """Take an operation into account, after its rule was applied."""
        still = [ref for ref in op.inputs if ref.number in self._still]
        moving = [ref for ref in op.inputs if ref.number not in self._still]
        if not moving:
            self._still.update(ref.number for ref in op.outputs)
            made_of = {name: leaf for ref in still for name, leaf in self._leaves.get(ref.number, {}).items()}
            self._leaves |= {ref.number: made_of for ref in op.outputs}
        elif still:
            weights, before, after = self._units(still), self._units(moving), self._units(op.outputs)
            # What is pinned at once met an input in this very operation: a scale of the input's features, say.
            known = np.union1d(before, self._roots([units for units, _ in self._context.units.pins[self._pins :]]))
            self._written.append(np.setdiff1d(np.intersect1d(weights, after), known))
            self._read.append(np.setdiff1d(np.intersect1d(weights, before), after))
            summed = self._roots(self._context.summed[self._summed :])
            for name, leaf in {k: v for ref in still for k, v in self._leaves.get(ref.number, {}).items()}.items():
                self._assign(name, leaf, summed)
        self._pins, self._summed = len(self._context.units.pins), len(self._context.summed)

    def of(self, name: str, axis: int) -> Role:
        """Return what a parameter does with the units on one of its axes."""
        return self._of.get((name, axis), "writes")

    def _assign(self, name: str, leaf: Ref, summed: Ints) -> None:
        """Say what an operation does with every axis of a parameter: it sums over it, or it does not."""
        reads: dict[int, bool] = {}
        on_axes = {factor.axes[0]: factor.units for factor in self._context.value(leaf).factors}
        on_axes |= {axis: o.factor.units for (owner, axis), o in self._context.opened.items() if owner == name}
        for axis, units in on_axes.items():
            reads[axis] = bool(np.isin(self._context.units.find(units.ravel()), summed).all())
        if all(reads.values()) and (len(reads) > 1 or (name, next(iter(reads), 0)) in self._of):
            return  # all of it is one space already, as in a later step of a recurrent layer
        for axis, read in reads.items():
            now = "reads" if read else "writes"
            self._of[name, axis] = now if self._of.get((name, axis), now) == now else "both"

    def refine(self, units: Ints, reasons: list[str]) -> list[str]:
        """Tell hidden units among what inputs and outputs fix.

        A unit that some weight writes into an activation is hidden, also if an input is then added to it; a row of a
        table that inputs look up, such as a token of the vocabulary, is an input by another name. A unit that some
        weight reads out of an activation is hidden, also if it is returned too.

        Args:
            units: the fixed units (roots).
            reasons: why each is fixed.
        """
        roles = (mask[units] for mask in self._masks)
        return [_refined(*each) for each in zip(reasons, *roles, strict=True)]

    @cached_property
    def _masks(self) -> list[NDArray[np.bool_]]:
        """By root: whether it is written, read, returned; only right once all operations were noted."""
        returned = [pinned for pinned, reason in self._context.units.pins if reason == OUTPUT]
        masks = [np.zeros(len(self._context.units), np.bool_) for _ in range(3)]
        for mask, parts in zip(masks, (self._written, self._read, returned), strict=True):
            mask[self._roots(parts)] = True
        return masks

    def _units(self, refs: Iterable[Ref]) -> Ints:
        factors = [factor.units.ravel() for ref in refs for factor in self._context.value(ref).factors]
        return np.unique(self._context.units.find(np.concatenate(factors))) if factors else np.empty(0, np.int64)

    def _roots(self, parts: list[Ints]) -> Ints:
        return (
            self._context.units.find(np.unique(np.concatenate([part.ravel() for part in parts])))
            if parts
            else np.empty(0, np.int64)
        )


def _refined(reason: str, written: bool, read: bool, returned: bool) -> str:
    if reason == OUTPUT:
        return RETURNED if read else OUTPUT
    if reason not in _INPUT_REASONS:
        return reason
    if not written:
        return INPUT
    if returned and not read:
        return OUTPUT
    return reason if reason == LOOKED_UP else TIED
